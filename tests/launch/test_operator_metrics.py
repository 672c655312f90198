"""What an operator sees of launch/train.py: the metrics file, and lines of a log."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_classic

LAUNCH = Path(__file__).parents[2] / "launch"
sys.path.insert(0, str(LAUNCH))  # where its files find each other

from dist_asgd import EMA, Checkpointer, ShardedASGD, Uniform  # noqa: E402
from operator_metrics import OperatorMetrics  # noqa: E402


def test_every_number_of_metrics_is_in_a_file_that_both_parsers_read(tmp_path: Path) -> None:
    """node_exporter reads the classic format; the file is OpenMetrics, whose further lines are comments there."""
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    groups = [{"params": part.parameters(), "lr": lr} for part, lr in zip(model, (0.25, 0.5), strict=True)]
    optimizer = ShardedASGD(groups, average={"uniform": Uniform(), "recent": EMA(0.9)})
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    before = time.time()
    checkpointer.save(7, {"model": model})
    file = tmp_path / "run.prom"
    written = OperatorMetrics(str(file), "")
    written.write({"bits_per_byte": 4.0, "bits_per_byte/recent": 3.0}, 7)
    written.write(optimizer.metrics() | checkpointer.metrics(), 8)
    text = file.read_text()
    assert text.endswith("# EOF\n") and [path.name for path in tmp_path.glob("*run*")] == ["run.prom"]
    both = []
    for parse in (parse_openmetrics, parse_classic):
        samples = [sample for family in parse(text) for sample in family.samples]
        both.append({(sample.name, *sorted(sample.labels.items())): sample.value for sample in samples})
    assert both[0] == both[1]
    found = both[0]
    assert found["dist_asgd_learning_rate", ("group", "1")] == 0.5
    assert found["dist_asgd_mu", ("average", "recent"), ("group", "1")] == 1
    assert found["dist_asgd_held_out_bits_per_byte", ("average", "recent")] == 3  # kept from the write before
    assert found["dist_asgd_held_out_bits_per_byte", ("average", "")] == 4
    assert found["dist_asgd_checkpoint_saves_total",] == 1
    assert found["dist_asgd_checkpoint_written_bytes_total",] == checkpointer.metrics()["written_bytes"] > 0
    assert before <= found["dist_asgd_checkpoint_saved_timestamp_seconds",] <= time.time()


def test_a_directory_that_is_missing_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="its directory does not exist"):
        OperatorMetrics(f"{tmp_path}/none/run.prom", "")


def test_the_library_is_silent_and_the_lines_of_a_run_have_rank_and_step() -> None:
    warn = "import logging, torch, dist_asgd; logging.getLogger('dist_asgd.checkpoint').warning('told'); "
    setup = f"import sys; sys.path.insert(0, {str(LAUNCH)!r}); from world import World, log_with_rank; "
    rank = "log_with_rank(World(3, 4, torch.device('cpu'), None), lambda: 12); "
    again = "logging.getLogger('dist_asgd.checkpoint').warning('once')"
    ran = subprocess.run([sys.executable, "-c", warn + setup + rank + again], capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout == "" and "told" not in ran.stderr, ran
    assert len(ran.stderr.splitlines()) == 1 and "WARNING [rank 3, step 12] dist_asgd.checkpoint: once" in ran.stderr
