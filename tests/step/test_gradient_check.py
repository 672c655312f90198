"""Sums of gradients by which ranks compare them in the first steps."""

import pytest
import torch

from dist_asgd.step import gradient_check
from dist_asgd.step.gradient_check import _sum_and_norm
from tests.support.memory import peak_resident, reset_peak


@pytest.mark.parametrize("gradient", [torch.randn(5, 7), torch.randn(40, dtype=torch.complex64), torch.randn(0)])
def test_chunks_add_up(monkeypatch, gradient):
    whole = _sum_and_norm(gradient)
    monkeypatch.setattr(gradient_check, "CHUNK", 8)
    torch.testing.assert_close(_sum_and_norm(gradient), whole, rtol=1e-12, atol=1e-12)
    assert whole[1].item() == pytest.approx(gradient.norm().item(), rel=1e-5)


def test_swapped_elements_change_the_sum():
    gradient = torch.randn(100)
    swapped = gradient.clone()
    swapped[[3, 97]] = gradient[[97, 3]]
    assert abs(_sum_and_norm(gradient)[0] - _sum_and_norm(swapped)[0]) > 1e-3


def test_no_copy_of_a_large_gradient():
    gradient = torch.ones(2**25)  # 128 MiB
    reset_peak()
    before = peak_resident()
    _sum_and_norm(gradient)
    assert peak_resident() - before < 2**27, "chunks take 64 MiB"
