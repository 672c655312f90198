"""`ShardedAverages` equals the recursion over whole iterates, under every layout, on 1 to 4 ranks."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_asgd import ShardedAverages
from tests.support.beside import KINDS, STEPS, iterate, trained
from tests.support.iterates import averaged
from tests.support.layouts import EVERYWHERE, backward, named_parameters
from tests.support.ranks import run_ranks


def everything(model: nn.Module) -> list[Tensor]:
    return [value.clone() for value in iterate(model).values()]


def check_layout(rank: int, layout: str) -> None:
    model, optimizer, averages, iterates = trained(layout)
    before = everything(model)
    for name, kind in KINDS.items():
        expected = averaged(iterates, kind)
        found = averages.full_state_dict(name)
        assert list(found) == (list(expected) if rank == 0 else [])
        assert all(torch.equal(found[key], expected[key]) for key in found), name
        with averages.averaged_parameters(name):
            inside = iterate(model)
            backward(model, layout, 0)  # a forward inside reads the averages
            optimizer.zero_grad()
        assert all(torch.equal(inside[key], expected[key]) for key in expected), name
    assert all(map(torch.equal, before, everything(model)))
    backward(model, layout, STEPS)
    optimizer.step()
    assert averages.updates == STEPS + 1
    numel = sum(param.numel() for param in named_parameters(model).values())
    own = bytes_of(averages)
    total = sum(averages._agreement.gather(own))
    assert total <= 2 * 4 * numel + 2 * 4 * 32 * 8 * dist.get_world_size(), "replicas share"


def bytes_of(averages: ShardedAverages) -> int:
    return sum(
        0 if average is None else average.nbytes
        for _, bucket in averages._buckets
        for average in bucket.shard.averages.values()
    )


@pytest.mark.parametrize(("layout", "world_size"), EVERYWHERE, ids=lambda value: str(value))
def test_the_recursion_over_whole_iterates(layout, world_size):
    run_ranks(world_size, check_layout, layout)
