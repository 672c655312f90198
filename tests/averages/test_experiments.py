"""Two experiments of benchmarks/averaging at their real size: the figures that docs/averaging.md gives."""

from typing import Any

from benchmarks.averaging import bf16, least_squares
from tests.support.ranks import run_ranks

SEED = 0


def test_the_average_is_optimal_on_least_squares() -> None:
    def ranks(rank: int) -> dict[str, Any]:
        return least_squares.measure(SEED, least_squares.CASES["well chosen"])

    (figures,) = run_ranks(1, ranks)
    assert 0.9 < figures["average"] <= 1.15
    assert figures["last"] >= 40


def test_averages_of_bf16_parameters_beside_torchs() -> None:
    def ranks(rank: int) -> dict[str, Any]:
        return bf16.measure(bf16.ours, SEED, skipped=1)

    figures = run_ranks(2, ranks)[0]
    assert abs(figures["drift"] - 1.5) < 1e-3 and figures["noise_error"] < 1e-5
