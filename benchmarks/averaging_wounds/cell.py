"""A cell of the table: a peer in a situation, in fresh processes."""

from __future__ import annotations

import json
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from benchmarks.averaging_wounds.oracle import ERROR, HANGS, RIGHT, Finding, failure, together
from benchmarks.averaging_wounds.peer import Peer
from benchmarks.averaging_wounds.situations import SITUATIONS, Part
from tests.support.ranks import RankError, run_ranks

GRACE = 10.0  # seconds that other ranks have after one has failed


def run_cell(number: int, kind: type[Peer], timeout: float) -> Finding:
    """Runs a situation in each way of the peer. Right if one of them is; else what the first, documented one gives."""
    ways = kind.ways.get(number, ("",))
    found = [_run_way(number, kind, way, timeout) for way in ways]
    notes = [f"{way}: {one.verdict}, {one.note}" for way, one in zip(ways, found, strict=True)]
    best = next((one for one in found if one.verdict == RIGHT), found[0])
    return best if len(ways) == 1 else Finding(best.verdict, "; ".join(notes))


def _run_way(number: int, kind: type[Peer], way: str, timeout: float) -> Finding:
    """Runs the phases of a situation one after the other, up to the first that does not go through."""
    done: list[Finding] = []
    with tempfile.TemporaryDirectory(prefix="wounds-") as folder:
        for phase, (ranks, part) in enumerate(SITUATIONS[number].phases):
            place = Path(folder, str(phase))
            place.mkdir()
            done.append(_on_ranks(ranks, part, kind, way, Path(folder, "checkpoint"), place, timeout))
            if done[-1].verdict != RIGHT:
                break
    return together(done)


def _on_ranks(
    ranks: int, part: Part, kind: type[Peer], way: str, folder: Path, answers: Path, timeout: float
) -> Finding:
    problem = ""
    try:
        run_ranks(ranks, _rank, ranks, part, kind, way, folder, answers, timeout=timeout)
    except RankError as error:
        problem = str(error)
    found = [Finding(**json.loads(path.read_text())) for path in sorted(answers.glob("*.json"))]
    return _of_ranks(found, ranks, problem)


def _of_ranks(found: Sequence[Finding], ranks: int, problem: str) -> Finding:
    """Returns what the ranks found, in one."""
    if not found:
        hangs = "still running" in problem
        return Finding(HANGS, "no rank had ended in time") if hangs else Finding(ERROR, "the processes died")
    worst = together(found).verdict
    note = next(one.note for one in found if one.verdict == worst)
    if len(found) < ranks:
        return Finding(HANGS if worst == RIGHT else worst, f"{note} (on {len(found)} of {ranks} ranks; others wait)")
    return Finding(worst, note)


def _rank(rank: int, ranks: int, part: Part, kind: type[Peer], way: str, folder: Path, answers: Path) -> None:
    """The part of one rank. One that fails waits a little before it ends, so that others can say what they find."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    warnings.filterwarnings("ignore")
    place = answers / f"{rank}.json"
    try:
        _write(place, part(kind, way, folder))
    except BaseException as error:  # CheckpointException is none of Exception's; a peer exits the process
        _write(place, failure(error))
        end = time.monotonic() + GRACE
        while time.monotonic() < end and len(list(answers.glob("*.json"))) < dist.get_world_size():
            time.sleep(0.1)
        raise


def _write(place: Path, finding: Finding) -> None:
    place.with_suffix(".part").write_text(json.dumps(asdict(finding)))
    place.with_suffix(".part").rename(place)
