"""Averages on the host of parameters on another device: the bits of averages beside the parameters."""

import pytest
import torch

from dist_asgd.kernels import offloading
from dist_asgd.kernels.averaging import move_averages_
from dist_asgd.kernels.offloading import copy_on, move_host_averages_
from dist_asgd.kernels.tensor_list import TensorList

SIZES = (0, 1, 5, 1000, 2500)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_have_the_bits_of_one_pass(dtype, monkeypatch):
    """Parameters on the CPU stand for those of a device without events, whose blocks are copied at once."""
    monkeypatch.setattr(offloading, "BLOCK", 1000)
    params = [torch.randn(size).to(dtype) for size in SIZES]
    starts = [sum(SIZES[:number]) for number in range(len(SIZES))]
    expected = [torch.randn(sum(SIZES)) for _ in range(2)]
    found = [average.clone() for average in expected]
    parts = TensorList.of(params, starts)
    for mus in ([1.0, 0.3], [0.25, 0.0], [0.1, 1.0]):
        move_averages_(parts, expected, mus)
        move_host_averages_(parts, found, mus)
        assert all(map(torch.equal, found, expected))


def test_at_most_two_blocks_are_under_way(monkeypatch):
    monkeypatch.setattr(offloading, "BLOCK", 10)
    events = []
    start, move = offloading._HostBlock.of, offloading._move
    monkeypatch.setattr(offloading._HostBlock, "of", lambda *block: (events.append(1), start(*block))[1])
    monkeypatch.setattr(offloading, "_move", lambda *block: (events.append(-1), move(*block))[1])
    move_host_averages_(TensorList.of([torch.ones(95)]), [torch.zeros(95)], [0.5])
    under_way = [sum(events[: number + 1]) for number in range(len(events))]
    assert max(under_way) == 2 and under_way[-1] == 0 and events.count(1) == 10


def test_a_copy_is_one():
    values = torch.ones(3)
    copy = copy_on(torch.device("cpu"), values, torch.float32)
    assert copy.data_ptr() != values.data_ptr() and torch.equal(copy, values)
