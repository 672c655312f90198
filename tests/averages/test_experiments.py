"""An experiment of benchmarks/averaging at its real size: figures that the guide to averaging gives."""

from tests.support.processes import free_port, start_ranks


def test_the_average_is_optimal_on_least_squares() -> None:
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    command = ["--worker", "--seed=0", "--case=well chosen"]
    module = "benchmarks.averaging.least_squares"
    figures = start_ranks(module, command, prefixes=[[]], environment=environment, timeout=300.0)[0]
    assert 0.9 < figures["average"] <= 1.15
    assert figures["last"] >= 40
