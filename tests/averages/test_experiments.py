"""Experiments of benchmarks/averaging: one at its real size, for figures of the guide, and one to see that it runs."""

import json
import math
from pathlib import Path

from tests.support.processes import free_port, start_ranks
from tests.support.ranks import run_program


def test_the_average_is_optimal_on_least_squares() -> None:
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    command = ["--worker", "--seed=0", "--case=well chosen"]
    module = "benchmarks.averaging.least_squares"
    figures = start_ranks(module, command, prefixes=[[]], environment=environment, timeout=300.0)[0]
    assert 0.9 < figures["average"] <= 1.15
    assert figures["last"] >= 40


def test_averages_beside_adamw_at_a_tiny_size(tmp_path: Path) -> None:
    """All that the experiment does, from the training to the tables and the plot."""
    out, plot = tmp_path / "rows.jsonl", tmp_path / "plot.svg"
    options = ["--size=tiny", "--seeds=1", "--rates", "0.01", "--ranks", "1", f"--json={out}", f"--plot={plot}"]
    run_program("benchmarks.averaging.adamw", *options)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    of_seeds, others = rows[:-4], rows[-4:]
    figures = {row["name"]: row["test"] for row in of_seeds}
    assert len(set(figures.values())) == len(figures) == 13 and all(map(math.isfinite, figures.values()))
    shown = {"last iterate", "EMA 0.05", "merge, linear", "decay, linear"}
    assert others == [row for row in of_seeds if row["name"] in shown]
    assert "Byte-level GPT" in plot.read_text()
