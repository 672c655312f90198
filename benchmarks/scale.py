"""What thousands of ranks cost one of them: construction, state_dict() and the plan of a checkpoint, beside the peers.

    python -m benchmarks.scale --worlds 8 64 512 4096

No row needs more than one process, and each has one of its own, with one thread. Memory is the growth of the highest
resident memory (see memory.py) while the function ran, after a small one of the same kind; what was there before, as
the parameters, is not in it, what the function makes and keeps is.

*Optimizers* (``real``): one rank of N on PyTorch's fake process group, of which every collective returns at once. So
these figures hold all that a rank computes and none of what it waits for: no network, and no connections (the
optimizer's group for agreements is gloo's on a real machine and a fake one here). What it gathers is N times its own,
but for the others' coordinates in the mesh.
- plain parameters, averaging off: ours (``gradients="local"``) beside ZeroRedundancyOptimizer, of which only the
  construction is comparable: it has no sharded state dict. Ours moves the parameters into buckets meanwhile.
- parameters as FSDP2 places them, Shard(0) over all ranks: ours beside torch.optim.ASGD after a step. The DTensors are
  made from this rank's block; nothing is wrapped. Models of which a rank would have more than ``--most`` are left out.
Planning is DefaultSavePlanner's for {"optimizer": state_dict()}, what a rank does in dcp.save before it talks to
others; the plan is what it sends to the coordinator. Its keys are all names, which torch's planner sends in each plan.

*Layout* (``layout``): ours, plain parameters that need not exist. plan_buckets, and of one rank the pieces, StatePieces
over a single element that is repeated, and their plan. The chunks of all ranks are those of 16 of them, scaled up.

*Coordinator* (``global``): torch's create_global_plan for the plans of all ranks, and its metadata. Plans of plain
parameters are those of pure layout (tests/optimizer/test_scale.py), those of FSDP2's come from one
optimizer after the other. In this process plans share the keys that each would bring along; so time is all of torch's
work, and memory only that beyond the plans.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import multiprocessing
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
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

from benchmarks.memory import MIB, map_large_blocks, peak_resident, reset_peak
from benchmarks.processes import end_cleanly, report, start_ranks
from benchmarks.table import print_table, write_json_lines
from dist_asgd import ShardedASGD
from dist_asgd.sharding.layout import BucketLayout, plan_buckets
from dist_asgd.sharding.placement import Placement
from dist_asgd.sharding.sharded_state import ScalarCopy, StatePiece

Shape = tuple[int, ...]
Row = dict[str, Any]
PEERS = {"plain": "zero", "fsdp": "asgd"}
BUCKET_BYTES = 25 * 2**20  # as ShardedASGD's
SAMPLED = 16  # ranks
SMALL = 4  # parameters of what is run first
REAL_COLUMNS = {
    "layout": "",
    "ranks": "ranks",
    "size": "parameters",
    "construct": "construction, s",
    "peer_construct": "peer's",
    "construct_ratio": "peer's/ours",
    "construct_mib": "MiB",
    "peer_construct_mib": "peer's",
    "plan": "state_dict + plan, s",
    "peer_plan": "peer's",
    "plan_ratio": "peer's/ours",
    "plan_mib": "MiB",
    "peer_plan_mib": "peer's",
    "share_mib": "share of ax, MiB",
    "items": "plan's items",
    "peer_items": "peer's",
    "kib": "their KiB",
    "peer_kib": "peer's",
    "keys_kib": "keys, KiB",
}
LAYOUT_COLUMNS = {
    "ranks": "ranks",
    "size": "parameters",
    "bucket_mib": "bucket, MiB",
    "buckets": "buckets",
    "layout": "layout, s",
    "plan": "pieces + plan, s",
    "mib": "MiB",
    "items": "plan's items",
    "kib": "their KiB",
    "chunks": "chunks, all ranks",
    "metadata_mib": "their MiB",
    "fsdp_chunks": "FSDP2's chunks",
}
GLOBAL_COLUMNS = {
    "ranks": "ranks",
    "size": "parameters",
    "name": "",
    "items": "items of all plans",
    "seconds": "global plan, s",
    "mib": "MiB",
    "metadata_mib": "metadata, MiB",
    "chunks": "chunks",
    "over_ours": "time of ours",
}
HEADINGS = {
    "real": "One rank on the fake process group, fp32. Peers: ZeroRedundancyOptimizer (plain), torch.optim.ASGD (fsdp)",
    "layout": "Plain parameters by pure layout, fp32, one rank",
    "global": "The coordinator's plan, torch's own, for the plans of all ranks",
}
COLUMNS = {"real": REAL_COLUMNS, "layout": LAYOUT_COLUMNS, "global": GLOBAL_COLUMNS}
NAMES = {"plain": "ours, plain", "fsdp": "ours, FSDP2's", "asgd": "torch.optim.ASGD, FSDP2's"}


def main() -> None:
    options = _arguments()
    torch.set_num_threads(1)
    if options.worker is not None:
        report(_worker(*options.worker.split(",")))
        return
    end_cleanly()
    rows: list[Row] = []
    for table in options.tables:
        found = list({"real": _real_rows, "layout": _layout_rows, "global": _global_rows}[table](options))
        print(f"\n{HEADINGS[table]}\n", flush=True)
        print_table(found, COLUMNS[table])
        rows += [{"table": table, **row} for row in found]
    write_json_lines(options.json, rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--tables", nargs="+", default=list(COLUMNS), choices=list(COLUMNS))
    parser.add_argument("--worlds", type=int, nargs="+", default=[8, 64, 512, 4096])
    sizes = ["10000x64x64", "10000x4096x24"]
    parser.add_argument("--plain", nargs="+", default=sizes, metavar="COUNTxSHAPE", help="real, of each rank")
    large = ["10000x8192x1221", "10000x16384x6104"]
    parser.add_argument("--fsdp", nargs="+", default=[sizes[1], *large], metavar="COUNTxSHAPE", help="real")
    parser.add_argument("--layout", nargs="+", default=[*sizes, large[1]], metavar="COUNTxSHAPE", help="layout")
    parser.add_argument("--buckets", type=int, nargs="+", default=[25, 400], metavar="MIB", help="layout")
    parser.add_argument("--most", type=float, default=2**30, metavar="BYTES", help="fsdp: of parameters, on one rank")
    both = ["8:1000x4096x24", "64:1000x4096x24"]
    parser.add_argument("--both", nargs="*", default=both, metavar="RANKS:COUNTxSHAPE", help="global, with the peer")
    ours = ["4096:1000x4096x24", "512:10000x64x64", "4096:10000x64x64"]
    parser.add_argument("--ours", nargs="*", default=ours, metavar="RANKS:COUNTxSHAPE", help="global, ours alone")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("scale.jsonl"), metavar="FILE")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def parse_size(text: str) -> list[Shape]:
    """COUNTxSHAPE: the shapes of all parameters."""
    count, *shape = map(int, text.split("x"))
    return [tuple(shape)] * count


def _run(*arguments: object) -> Row:
    worker = ["--worker", ",".join(map(str, arguments))]
    return start_ranks("benchmarks.scale", worker, prefixes=[[]], environment={}, timeout=1800)[0]


def _worker(table: str, name: str, ranks: str, size: str, *rest: str) -> Row:
    map_large_blocks()
    shapes, world_size = parse_size(size), int(ranks)
    if table == "layout":
        measure_layout(shapes[:SMALL], world_size, int(rest[0]) * MIB)
        return measure_layout(shapes, world_size, int(rest[0]) * MIB)
    if table == "global":
        measure_global(name, shapes[:SMALL], 8)
        return measure_global(name, shapes, world_size)
    with fake_ranks(world_size, rank=world_size // 2):
        measure_optimizer(name, shapes[:SMALL])
        gc.collect()
        return measure_optimizer(name, shapes)


def _timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Its result, seconds, and MiB by which resident memory grew at most."""
    before = reset_peak()
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    return result, round(seconds, 3), round((peak_resident() - before) / MIB, 1)


_UNITS = {0: "", 3: " k", 6: " M", 9: " B", 12: " T"}


def _size_text(shapes: Sequence[Shape]) -> str:
    total = sum(map(math.prod, shapes))
    power = max(p for p in _UNITS if total >= 0.95 * 10**p)
    return f"{len(shapes):,} = {total / 10**power:.3g}{_UNITS[power]}"


def _ratio(peer: float | None, ours: float) -> float | None:
    return None if peer is None else round(peer / ours, 2)


# Optimizers on the fake process group


def _real_rows(options: argparse.Namespace) -> Iterator[Row]:
    for layout, sizes in (("plain", options.plain), ("fsdp", options.fsdp)):
        for size in sizes:
            for ranks in options.worlds:
                total = 4 * sum(map(math.prod, parse_size(size)))
                if layout == "plain" or total / ranks <= options.most:
                    yield _real_row(layout, ranks, size, total / ranks)


def _real_row(layout: str, ranks: int, size: str, share: float) -> Row:
    ours, peer = _run("real", layout, ranks, size), _run("real", PEERS[layout], ranks, size)
    return {
        "layout": layout,
        "ranks": ranks,
        "size": _size_text(parse_size(size)),
        "share_mib": round(share / MIB, 1),
        **ours,
        **{f"peer_{key}": value for key, value in peer.items()},
        "construct_ratio": _ratio(peer["construct"], ours["construct"]),
        "plan_ratio": _ratio(peer["plan"], ours["plan"]),
    }


@contextlib.contextmanager
def fake_ranks(world_size: int, rank: int) -> Iterator[None]:
    """Inside, this process is one rank of many, of which the others do not exist."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    new_group, gather = dist.new_group, dist.all_gather_object

    def fake_group(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **(kwargs | {"backend": "fake"}))  # gloo, for agreements, would look for the others

    def fake_gather(everyone: list[Any], item: Any, group: Any = None) -> None:
        gather(everyone, item, group=group)  # the others bring what this rank does,
        if item == [(rank,)]:  # but for their coordinates in the mesh of all
            everyone[:] = [[(other,)] for other in range(world_size)]

    try:
        with mock.patch.multiple(dist, new_group=fake_group, all_gather_object=fake_gather):
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


# Pure layout


def _layout_rows(options: argparse.Namespace) -> Iterator[Row]:
    for size in options.layout:
        for mib in options.buckets:
            for ranks in options.worlds:
                row = _run("layout", "ours", ranks, size, mib)
                yield {"ranks": ranks, "size": _size_text(parse_size(size)), "bucket_mib": mib, **row}


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


# The coordinator


def _global_rows(options: argparse.Namespace) -> Iterator[Row]:
    pairs = [(case, list(NAMES)) for case in options.both] + [(case, ["plain"]) for case in options.ours]
    for case, names in pairs:
        ranks, size = case.split(":")
        rows = {name: _run("global", name, ranks, size) for name in names}
        for name, row in rows.items():
            over = _ratio(row["seconds"], rows["plain"]["seconds"])
            about = {"ranks": int(ranks), "size": _size_text(parse_size(size)), "name": NAMES[name]}
            yield {**about, **row, "over_ours": over}


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


if __name__ == "__main__":
    main()
