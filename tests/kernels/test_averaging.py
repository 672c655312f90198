"""Averages beside any optimizer, in one pass over memory: their bits, and what is neither read nor written."""

import itertools
from collections.abc import Sequence

import pytest
import torch

from dist_asgd.asgd.rule import average_step_
from dist_asgd.kernels.averaging import move_averages_
from dist_asgd.kernels.cpu import native_averaging
from dist_asgd.kernels.tensor_list import TensorList
from tests.support.ranks import run_alone

F32, F64 = torch.float32, torch.float64
DTYPES = [(param, average) for param in (F32, torch.bfloat16, torch.float16) for average in (F32, F64)] + [(F64, F64)]
# One lies across the middle of all, where the work of two threads meets; some are empty or no multiple of a vector.
SIZES = [1, 0, 33, 64, 40_001, 7, 130, 0, 4096, 30_000]
MUS = ((1 / 3,), (1.0,), (0.3, 1.0, 0.0, 0.7))


def check(param: torch.dtype, average: torch.dtype, mus: Sequence[float]) -> None:
    """Compares with ``average_step_``, whole tensor by whole tensor; every other parameter begins off 16 bytes."""
    generator = torch.Generator().manual_seed(1)
    wholes = [torch.randn(n + 1, generator=generator).to(param) for n in SIZES]
    params = [whole[1:] if index % 2 else whole[:-1] for index, whole in enumerate(wholes)]
    before = [p.clone() for p in params]
    params[0] = params[0].view(())  # 0-D
    starts = list(itertools.accumulate((n + 3 for n in SIZES), initial=5))
    own = list(torch.randn(len(mus), starts[-1], generator=generator, dtype=F64).to(average))
    expected = [ax.clone() for ax in own]
    move_averages_(TensorList.of(params, starts[:-1]), own, mus)
    for (ax, mu), (p, start) in itertools.product(
        zip(expected, mus, strict=True), zip(before, starts[:-1], strict=True)
    ):
        average_step_(ax[start : start + len(p)], p, mu)
    assert all(map(torch.equal, own, expected)), (param, average, mus)
    assert all(torch.equal(p.view(-1), kept) for p, kept in zip(params, before, strict=True))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("param", "average"), DTYPES, ids=str)
def test_one_pass_has_the_bits_of_the_operators(param: torch.dtype, average: torch.dtype, threads: int) -> None:
    if native_averaging(param, average) is None:
        pytest.skip("NO C COMPILER HERE, or one that makes other bits: the pass was not tested")

    def alone() -> None:
        torch.set_num_threads(threads)
        for mus in MUS:
            check(param, average, mus)

    run_alone(alone)


@pytest.mark.parametrize(("param", "average"), [(F32, F32), (torch.bfloat16, F32), (F64, F32)], ids=str)
def test_operators_have_the_same_bits(
    param: torch.dtype, average: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They serve where there is no compiler, and averages that are narrower than the parameters."""
    assert native_averaging(F64, F32) is None
    monkeypatch.setattr("dist_asgd.kernels.averaging.native_averaging", lambda *dtypes: None)
    monkeypatch.setattr("dist_asgd.kernels.dispatch.BLOCK_PER_THREAD", 96)
    for mus in MUS:
        check(param, average, mus)


def test_without_parameters_or_averages_nothing_happens() -> None:
    nan = torch.full((3,), torch.nan)
    move_averages_(TensorList.of([torch.zeros(0)]), [nan], [0.5])
    move_averages_(TensorList.of([torch.zeros(3)]), [], [])
    average = torch.ones(3)
    move_averages_(TensorList.of([nan]), [average], [0.0])
    assert nan.isnan().all() and average.tolist() == [1, 1, 1]
    with pytest.raises(ValueError):
        move_averages_(TensorList.of([nan]), [average], [0.5, 0.5])
