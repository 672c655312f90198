"""The two collectives, and norms, on gloo ranks."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from dist_asgd.buckets.base import ShardingOptions
from dist_asgd.comm.collectives import Collectives
from dist_asgd.comm.process_groups import SharedGroups
from dist_asgd.step.clip import total_norm
from tests.support.one_rank import CASES, trains_as_torch
from tests.support.ranks import run_alone, run_ranks

CPU = torch.device("cpu")
LARGE = 3 * 2**19  # elements of a shard: what no socket takes at once


def on_cpu():
    shared = SharedGroups.of(dist.group.WORLD, "a test")
    groups = shared.take(dist.group.WORLD, [shared.free()])
    return Collectives.on(groups, range(dist.get_world_size()), CPU)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_mean_is_summed_in_rank_order_and_divided_once(world_size, dtype):
    def ranks(rank):
        collectives = on_cpu()
        for numel in (64, LARGE if dtype == torch.float32 else 96):
            everyone = torch.randn(world_size, world_size * numel, generator=torch.Generator().manual_seed(0)).to(dtype)
            wide = torch.promote_types(dtype, torch.float32)
            mean = collectives.start_reduce(everyone[rank], wide).finish()
            expected = everyone[0].to(wide)
            for other in everyone[1:]:
                expected = expected + other.to(wide)
            assert mean.dtype == wide
            assert torch.equal(mean, (expected / world_size)[rank * numel : (rank + 1) * numel])

    run_ranks(world_size, ranks)


def test_backends_with_a_reduce_scatter_use_it_where_it_adds_in_the_dtype_of_the_sum():
    def ranks(rank):
        everyone = torch.arange(3 * 96.0).view(3, 96)
        collectives = replace(on_cpu(), downward=None)  # as NCCL's
        reduction = collectives.start_reduce(everyone[rank].clone(), torch.float32)
        assert [len(part) for part in reduction.parts] == [32]
        mean = reduction.finish()
        assert torch.equal(mean, everyone.mean(0)[rank * 32 : (rank + 1) * 32])
        assert mean.data_ptr() == reduction.parts[0].data_ptr()  # divided where it was received

        everyone = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16).repeat(1, 96)  # 257 is no bf16 number
        reduction = collectives.start_reduce(everyone[rank].clone(), torch.float32)
        assert reduction.parts[0].dtype == torch.bfloat16  # as it was sent
        assert torch.equal(reduction.finish(), torch.full((32,), 258 / 3))

    run_ranks(3, ranks)


def test_buckets_are_larger_where_the_host_does_not_carry_out_collectives():
    def ranks(rank):
        options = ShardingOptions(
            rank=0, world_size=1, groups=None, group=None, precision=None, averages={}, bucket_bytes=None
        )
        gloo, gpu, found = on_cpu(), torch.device("cuda"), []
        for device, collectives in (
            (CPU, None),
            (CPU, gloo),
            (gpu, gloo),
            (gpu, replace(gloo, downward=None)),
            (gpu, None),
        ):
            found.append(4 * options.max_numel(torch.float32, device, collectives) // 2**20)
        assert found == [25, 25, 25, 64, 64]
        assert replace(options, bucket_bytes=80).max_numel(torch.bfloat16, gpu, None) == 40

    run_ranks(1, ranks)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("numel", [32, LARGE])
def test_gathering_fills_the_buffer_in_place(world_size, numel):
    def ranks(rank):
        buffer = torch.full((world_size * numel,), -1.0)
        shard = buffer[rank * numel : (rank + 1) * numel]
        shard.fill_(rank)
        on_cpu().start_gather(buffer, shard).wait()
        assert torch.equal(buffer, torch.arange(float(world_size)).repeat_interleave(numel))

    run_ranks(world_size, ranks)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
def test_the_norm_counts_each_element_of_every_rank_once(norm_type):
    def ranks(rank):
        everyone = torch.randn(3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        own = [everyone[rank, :4], everyone[rank, 4:]] if rank else []  # rank 0 has nothing
        norm = total_norm(own, norm_type, torch.device("cpu"), dist.group.WORLD)
        expected = torch.linalg.vector_norm(everyone[1:], norm_type)
        torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)

    run_ranks(3, ranks)


@pytest.mark.parametrize("case", CASES)
def test_one_rank_that_sends_to_itself_has_the_bits_of_torch(case):
    """What tests/gpu runs by NCCL, where there is a GPU."""
    assert run_alone(trains_as_torch, CPU, case) >= 1
