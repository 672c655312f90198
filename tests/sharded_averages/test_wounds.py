"""Situations of benchmarks/wounds.py that cost little, for this library and for torch's AveragedModel."""

import json
import os
import subprocess
import sys

from tests.support.processes import ROOT


def test_the_table_tells_right_from_wrong(tmp_path):
    """A late start, a checkpoint in the middle of averaging, and steps that GradScaler skips."""
    file = tmp_path / "wounds.jsonl"
    command = [
        sys.executable,
        "-m",
        "benchmarks.wounds",
        "--peers",
        "ours",
        "AveragedModel",
        "--situations",
        "3",
        "9",
        "12",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--json", str(file)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    rows = map(json.loads, file.read_text().splitlines())
    found = {(row["peer"], row["situation"]): (row["verdict"], row["note"]) for row in rows}
    assert [found["ours", number][0] for number in (3, 9, 12)] == ["right"] * 3, found
    theirs = [found["AveragedModel", number][0] for number in (3, 9, 12)]
    assert theirs == ["silently wrong", "right", "silently wrong"], found
