"""Two experiments of benchmarks/averaging at their real size: the figures that the guide to averaging gives."""

from typing import Any

from tests.support.processes import free_port, start_ranks

TIMEOUT = 300.0


def figures_of(experiment: str, ranks: int, *arguments: str) -> dict[str, Any]:
    """Runs an experiment as its command does, on ``ranks`` processes, and returns what rank 0 reports."""
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    command = ["--worker", "--seed=0", *arguments]
    module = f"benchmarks.averaging.{experiment}"
    return start_ranks(module, command, prefixes=[[]] * ranks, environment=environment, timeout=TIMEOUT)[0]


def test_the_average_is_optimal_on_least_squares() -> None:
    figures = figures_of("least_squares", 1, "--case=well chosen")
    assert 0.9 < figures["average"] <= 1.15
    assert figures["last"] >= 40


def test_averages_of_bf16_parameters_beside_torchs() -> None:
    figures = figures_of("bf16", 2)
    assert abs(figures["drift"] - 1.5) < 1e-3 and figures["noise_error"] < 1e-5
