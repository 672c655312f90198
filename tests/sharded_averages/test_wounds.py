"""Situations of benchmarks/wounds.py that cost little, for this library and for torch's AveragedModel."""

import json

from tests.support.ranks import run_program


def test_the_table_tells_right_from_wrong(tmp_path):
    """A late start, a checkpoint in the middle of averaging, and steps that GradScaler skips."""
    file = tmp_path / "wounds.jsonl"
    peers, situations = ("ours", "AveragedModel"), (3, 9, 12)
    run_program("benchmarks.wounds", "--peers", *peers, "--situations", *situations, "--json", file)
    rows = map(json.loads, file.read_text().splitlines())
    found = {(row["peer"], row["situation"]): (row["verdict"], row["note"]) for row in rows}
    assert [found["ours", number][0] for number in (3, 9, 12)] == ["right"] * 3, found
    theirs = [found["AveragedModel", number][0] for number in (3, 9, 12)]
    assert theirs == ["silently wrong", "right", "silently wrong"], found
