"""Thousands of ranks: their plans cover everything once, and one rank's work does not grow with all of them.

benchmarks/scale.py says how one process can be a rank of many.
"""

import itertools
import pickle
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from dist_asgd import ShardedASGD
from dist_asgd.boxes import Box
from dist_asgd.buckets import replicas
from dist_asgd.step import gradient_check, validation
from tests.support import scale
from tests.support.ranks import run_alone

SHAPES = [(7, 5), (64, 3), (1,), (33, 2, 4), (130,), (16, 16)]
WORLDS = [8, 64]


def plan(name: str, world_size: int, rank: int, shapes: Sequence[scale.Shape] = SHAPES) -> SavePlan:
    return run_alone(scale.plan_of_rank, (name, shapes, world_size, rank))


def check_chunks(shapes: Sequence[scale.Shape], chunks: dict[str, list[Any]]) -> None:
    """Each element of each parameter is in one chunk."""
    for index, shape in enumerate(shapes):
        count = torch.zeros(shape, dtype=torch.int64)
        for chunk in chunks[f"p{index}"]:
            count[tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))] += 1
        assert bool((count == 1).all()), (index, shape)


def check_plans(shapes: Sequence[scale.Shape], plans: Sequence[SavePlan]) -> None:
    chunks: dict[str, list[Any]] = {}
    scalars: Counter[str] = Counter()
    for item in itertools.chain.from_iterable(plan.items for plan in plans):
        name, key = item.index.fqn.split(".")[-2:]
        if key == "ax":
            chunks.setdefault(name, []).append(item.tensor_data.chunk)
        else:
            scalars[f"{name}.{key}"] += 1
    check_chunks(shapes, chunks)
    assert scalars == {f"p{i}.{key}": 1 for i in range(len(shapes)) for key in ("step", "eta", "mu")}
    _, metadata = DefaultSavePlanner().create_global_plan(list(plans))  # raises where it finds gaps or overlaps
    assert len(metadata.state_dict_metadata) == 4 * len(shapes)


@pytest.mark.parametrize("name", ["plain", "fsdp"])
def test_the_plans_of_all_ranks_cover_every_element_once(name: str) -> None:
    shapes = SHAPES if name == "plain" else [(16, 3), (8,), (24, 2, 2)]  # torch plans empty blocks of empty ranks
    check_plans(shapes, [plan(name, 8, rank, shapes) for rank in range(8)])


def test_pure_layout_makes_the_plans_of_optimizers() -> None:
    layouts, placements = scale.lay_out(SHAPES, 8), scale.placements_of(SHAPES)
    for rank in (0, 3, 7):
        pure = scale.plan_save(scale.state_of_rank(layouts, placements, rank))
        real = plan("plain", 8, rank)
        assert sorted(map(repr, pure.items)) == sorted(map(repr, real.items))
        fewer = scale.plan_save(scale.state_of_rank(layouts, placements, rank, whole=False))
        assert fewer.items == pure.items


@pytest.mark.parametrize("bucket_bytes", [4096, 25 * 2**20])
def test_512_ranks_cover_every_element_once(bucket_bytes: int) -> None:
    shapes = [*SHAPES * 3, (1000, 70)]
    layouts, placements = scale.lay_out(shapes, 512, bucket_bytes), scale.placements_of(shapes)
    states = [scale.state_of_rank(layouts, placements, rank, whole=False) for rank in range(512)]
    check_plans(shapes, [scale.plan_save(state) for state in states])


def test_a_rank_plans_no_more_than_its_share() -> None:
    """Not the scalars of all parameters: they would meet on the coordinator, once from each rank."""
    shapes = [(64,)] * 1000
    for world_size in WORLDS:
        found = plan("plain", world_size, world_size // 2, shapes)
        assert len(found.items) <= 4 * (len(shapes) / world_size + 1), world_size


@pytest.mark.parametrize("name", ["plain", "zero", "fsdp", "asgd"])
def test_what_is_measured_of_an_optimizer(name: str) -> None:
    def one() -> dict[str, Any]:
        with scale.fake_ranks(8, 4):
            return scale.measure_optimizer(name, SHAPES)

    row = run_alone(one)
    assert row["construct"] >= 0 and (name == "zero") == (row["items"] is None)


def test_what_is_measured_without_optimizers() -> None:
    row = run_alone(scale.measure_layout, SHAPES, 8, 4096)
    chunks = [c for rank in range(8) for c in plan("plain", 8, rank).items if c.index.fqn.endswith(".ax")]
    assert run_alone(scale.measure_layout, SHAPES, 8, scale.BUCKET_BYTES)["chunks"] == len(chunks)
    assert row["chunks"] >= len(SHAPES)
    assert run_alone(scale.measure_global, "plain", SHAPES, 8)["chunks"] == len(chunks)


# Operations, counted


def placed(count: int, mesh: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [
        (f"p{i}", torch.nn.Parameter(DTensor.from_local(torch.ones(1, 3), mesh, [Shard(0)], run_check=False)))
        for i in range(count)
    ]


def exchanged(world_size: int, count: int) -> tuple[int, list[int]]:
    """Parameters on the data-parallel dim of a mesh of two, as FSDP2 has those that no tensor parallelism cuts.

    How often an optimizer of them lists the ranks of a mesh, and the bytes that this rank hands to each gather.
    """
    calls, sizes = Counter[str](), list[int]()
    mesh_ranks, gather = replicas.mesh_ranks, dist.all_gather_object

    def counted(mesh: Any) -> list[int]:
        calls["mesh_ranks"] += 1
        return mesh_ranks(mesh)

    def measured(everyone: list[Any], item: Any, group: Any = None) -> None:
        sizes.append(len(pickle.dumps(item)))
        gather(everyone, item, group=group)

    with scale.fake_ranks(world_size, 3), pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "mesh_ranks", counted)
        patch.setattr(replicas, "mesh_ranks", counted)
        patch.setattr(dist, "all_gather_object", measured)
        mesh = init_device_mesh("cpu", (world_size // 4, 4), mesh_dim_names=("dp", "tp"))["dp"]
        ShardedASGD(placed(count, mesh), lr=0.1)
    return calls["mesh_ranks"], sizes


def test_construction_asks_and_sends_the_same_for_any_ranks_and_parameters() -> None:
    calls, sizes = run_alone(exchanged, 8, 4)
    assert sizes and sum(sizes) < 500
    for world_size, count in ((8, 100), (256, 4), (256, 100)):
        more_calls, more_sizes = run_alone(exchanged, world_size, count)
        assert more_calls == calls, (world_size, count)
        assert sum(more_sizes) <= sum(sizes) + 20, (world_size, count, more_sizes)


def sample_bytes(world_size: int) -> int:
    """Of what a rank tells all others about its gradients before the first step."""
    with scale.fake_ranks(world_size, 3):
        params = scale.make_parameters(SHAPES, placed=False)
        optimizer = ShardedASGD(params.items(), lr=0.1, gradients="reduced")
        for p in params.values():
            p.grad = torch.ones_like(p)
        return len(pickle.dumps(gradient_check.gradient_sample(optimizer._all_buckets())))


def test_the_comparison_of_gradients_does_not_name_all_ranks() -> None:
    few, many = (run_alone(sample_bytes, world_size) for world_size in (8, 1024))
    assert many == few


def test_chunks_are_counted_by_the_ruler() -> None:
    """check_chunks finds what is missing and what is there twice."""
    half, whole = Box((0, 0), (1, 4)), Box((0, 0), (2, 4))
    check_chunks([(2, 4)], {"p0": [whole]})
    for wrong in ([half], [half, whole]):
        with pytest.raises(AssertionError):
            check_chunks([(2, 4)], {"p0": wrong})
