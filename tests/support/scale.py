"""Layouts, plans and states of one rank of thousands, made without the other ranks."""

from __future__ import annotations

import contextlib
import gc
import math
import multiprocessing
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard
from torch.optim import ASGD, Optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_asgd import ShardedASGD
from dist_asgd.comm import consensus, roll_call
from dist_asgd.sharding.layout import BucketLayout, plan_buckets
from dist_asgd.sharding.placement import Placement
from dist_asgd.sharding.sharded_state import ScalarCopy, StatePiece
from tests.support.memory import MIB, peak_resident, reset_peak

Shape = tuple[int, ...]


Row = dict[str, Any]


BUCKET_BYTES = 25 * 2**20  # as ShardedASGD's


SAMPLED = 16  # ranks


def _timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Its result, seconds, and MiB by which resident memory grew at most."""
    before = reset_peak()
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    return result, round(seconds, 3), round((peak_resident() - before) / MIB, 1)


class LonelyStore(FakeStore):
    """Has room for nothing, and nobody else looks into it."""

    def add(self, key: str, amount: int) -> int:
        return amount

    def check(self, keys: list[str]) -> bool:
        return False

    def set(self, key: str, value: str) -> None:
        pass

    def delete_key(self, key: str) -> bool:
        return False


@contextlib.contextmanager
def fake_ranks(world_size: int, rank: int) -> Iterator[None]:
    """Inside, this process is one rank of many, of which the others do not exist."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=LonelyStore())
    new_group, gather = dist.new_group, consensus.all_gather_object

    def fake_group(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **(kwargs | {"backend": "fake"}))  # gloo, for agreements, would look for the others

    def fake_gather(item: Any, group: Any) -> list[Any]:
        if item == [(rank,)]:  # coordinates in the mesh of all ranks
            return [[(other,)] for other in range(world_size)]
        return gather(item, group)  # every other rank brings what this rank does

    try:
        gathers = mock.patch.object(consensus, "all_gather_object", fake_gather)
        # Nobody else comes, and no work is ever said to be complete.
        nobody = {"assemble": lambda *_: None, "complete": lambda self, work, exchange: work.wait()}
        calls = mock.patch.multiple(roll_call.RollCall, **nobody)
        with mock.patch.object(dist, "new_group", fake_group), gathers, calls:
            yield
    finally:
        dist.destroy_process_group()


def make_parameters(shapes: Sequence[Shape], placed: bool) -> dict[str, nn.Parameter]:
    """Ones; ``placed`` as FSDP2 places them."""
    if not placed:
        return {f"p{index}": nn.Parameter(torch.ones(shape)) for index, shape in enumerate(shapes)}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = {}
    for index, shape in enumerate(shapes):
        rows = -(-shape[0] // mesh.size())
        own = max(0, min(rows, shape[0] - rows * mesh.get_local_rank()))
        local, stride = torch.ones(own, *shape[1:]), torch.empty(shape, device="meta").stride()
        placed_as = {"run_check": False, "shape": torch.Size(shape), "stride": stride}
        params[f"p{index}"] = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], **placed_as))
    return params


def build(name: str, params: dict[str, nn.Parameter]) -> Optimizer:
    if name == "zero":
        return ZeroRedundancyOptimizer(params.values(), optimizer_class=ASGD, lr=0.1)
    if name == "asgd":
        return ASGD(params.items(), lr=0.1)
    return ShardedASGD(params.items(), lr=0.1)


def measure_optimizer(name: str, shapes: Sequence[Shape]) -> Row:
    """This rank's figures of an optimizer: of its construction, and of its state_dict() and plan together."""
    params = make_parameters(shapes, name in ("fsdp", "asgd"))
    optimizer, seconds, mib = _timed(lambda: build(name, params))
    row: Row = {"construct": seconds, "construct_mib": mib}
    if name == "zero":
        return row | dict.fromkeys(("plan", "plan_mib", "items", "kib", "keys_kib"))
    if name == "asgd":
        _take_step(params, optimizer)
    plan, seconds, mib = _timed(lambda: plan_of(optimizer))
    return row | {"plan": seconds, "plan_mib": mib, **_plan_size(plan)}


def _take_step(params: dict[str, nn.Parameter], optimizer: Optimizer) -> None:
    """Of torch's ASGD, which has no state before. One by one, so that gradients take no memory."""
    groups = optimizer.param_groups[0]
    for p in params.values():
        groups["params"], p.grad = [p], torch.zeros_like(p)
        optimizer.step()
        p.grad = None
    groups["params"] = list(params.values())


def plan_of(optimizer: Optimizer) -> SavePlan:
    """This rank's plan of saving the state dict, under the parameters' names."""
    state_dict = optimizer.state_dict()
    names = state_dict["param_groups"][0]["param_names"]
    return plan_save({names[index]: entry for index, entry in state_dict["state"].items()})


def plan_save(named: dict[str, Any]) -> SavePlan:
    planner = DefaultSavePlanner()
    planner.set_up_planner({"optimizer": {"state": named}}, is_coordinator=False)
    return planner.create_local_plan()


def _plan_size(plan: SavePlan) -> Row:
    sizes = {"kib": len(pickle.dumps(plan.items)), "keys_kib": len(pickle.dumps(plan.planner_data))}
    return {"items": len(plan.items), **{key: round(size / 1024, 1) for key, size in sizes.items()}}


def lay_out(shapes: Sequence[Shape], world_size: int, bucket_bytes: int = BUCKET_BYTES) -> tuple[BucketLayout, ...]:
    return plan_buckets(list(map(math.prod, shapes)), world_size=world_size, max_numel=bucket_bytes // 4)


def state_of_rank(
    layouts: Sequence[BucketLayout], placements: Sequence[Placement], rank: int, *, whole: bool = True
) -> dict[str, dict[str, Tensor]]:
    """What state_dict() has on a rank, with one element in the place of all.

    Args:
        whole: else without the parameters of which the rank writes nothing.
    """
    value, state = torch.zeros(1), {}
    for layout in layouts:
        pieces = {piece.position: piece for piece in layout.pieces(rank)}
        for position in range(len(layout.spans)) if whole else pieces:
            index, piece = layout.spans[position].index, pieces.get(position)
            start, stop = (0, 0) if piece is None else (piece.start, piece.stop)
            scalars = {key: torch.zeros(()) for key in ("step", "eta", "mu")}
            if start or not stop:
                scalars = {key: ScalarCopy(scalar) for key, scalar in scalars.items()}
            ax = StatePiece(value.expand(stop - start), start, placements[index])
            state[f"p{index}"] = {**scalars, "ax": ax}
    return state


def placements_of(shapes: Sequence[Shape]) -> list[Placement]:
    known = {shape: Placement.of(torch.empty(shape, device="meta")) for shape in set(shapes)}
    return [known[shape] for shape in shapes]


def measure_layout(shapes: Sequence[Shape], world_size: int, bucket_bytes: int) -> Row:
    layouts, layout_seconds, layout_mib = _timed(lambda: lay_out(shapes, world_size, bucket_bytes))
    placements = placements_of(shapes)
    own = world_size // 2
    plan, seconds, mib = _timed(lambda: plan_save(state_of_rank(layouts, placements, own)))
    ranks = range(0, world_size, max(1, world_size // SAMPLED))
    chunks = [chunk for rank in ranks for chunk in chunks_of_rank(layouts, placements, rank)]
    scale = world_size / len(ranks)
    return {
        "buckets": len(layouts),
        "layout": layout_seconds,
        "plan": seconds,
        "mib": max(layout_mib, mib),
        **_plan_size(plan),
        "chunks": round(scale * len(chunks)),
        "metadata_mib": round(scale * len(pickle.dumps(chunks)) / MIB, 2),
        "fsdp_chunks": sum(min(world_size, shape[0]) for shape in shapes),
    }


def chunks_of_rank(layouts: Sequence[BucketLayout], placements: Sequence[Placement], rank: int) -> list[Any]:
    """The blocks of all parameters' ax that a rank writes."""
    value = torch.zeros(1)
    return [
        chunk
        for layout in layouts
        for p in layout.pieces(rank)
        for chunk in StatePiece(
            value.expand(p.stop - p.start), p.start, placements[layout.spans[p.position].index]
        ).__create_chunk_list__()
    ]


def plans_of_all(name: str, shapes: Sequence[Shape], world_size: int) -> list[SavePlan]:
    """The plan of each rank, which all have the keys of the first."""
    if name == "plain":
        layouts, placements = lay_out(shapes, world_size), placements_of(shapes)
        keys = plan_save(state_of_rank(layouts, placements, 0)).planner_data
        states = (state_of_rank(layouts, placements, rank, whole=False) for rank in range(world_size))
        return [SavePlan(plan_save(state).items, planner_data=keys) for state in states]
    # A process keeps the coordinates of the first rank that it was.
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        jobs = [(name, shapes, world_size, rank) for rank in range(world_size)]
        plans = list(pool.imap(plan_of_rank, jobs))
    return [SavePlan(plan.items, planner_data=plans[0].planner_data) for plan in plans]


def plan_of_rank(job: tuple[str, Sequence[Shape], int, int]) -> SavePlan:
    """Of a (name, shapes, world_size, rank): of an optimizer, on the fake process group."""
    name, shapes, world_size, rank = job
    with fake_ranks(world_size, rank):
        params = make_parameters(shapes, name in ("fsdp", "asgd"))
        optimizer = build(name, params)
        if name == "asgd":
            _take_step(params, optimizer)
        return plan_of(optimizer)


def measure_global(name: str, shapes: Sequence[Shape], world_size: int) -> Row:
    plans = plans_of_all(name, shapes, world_size)
    gc.collect()
    (_, metadata), seconds, mib = _timed(lambda: DefaultSavePlanner().create_global_plan(plans))
    chunks = [value.chunks for key, value in metadata.state_dict_metadata.items() if key.endswith(".ax")]
    return {
        "items": sum(len(plan.items) for plan in plans),
        "seconds": seconds,
        "mib": mib,
        "metadata_mib": round(len(pickle.dumps(metadata)) / MIB, 2),
        "chunks": sum(map(len, chunks)),
    }
