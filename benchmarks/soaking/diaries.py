"""What the diaries of all processes of a run say: whether the data was read in order, and where the time went."""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENDING, STARTING = "death, its detection, the end of the others", "the start of Python"
STEPS, REPEATED, SAVES = "steps that lasted", "repeated steps", "saves"
PHASES = {  # what a rank does after an event
    "start": "imports",
    "imported": "the rendezvous",
    "joined": "a look at the storage",
    "folders": "reading the text, building the model",
    "built": "loading",
    "saving": SAVES,
}


@dataclass(frozen=True, slots=True)
class Diary:
    """One process of one rank."""

    rank: int
    events: list[list[Any]]  # [seconds since the epoch, name, *facts], in order of time

    @property
    def steps(self) -> list[list[int]]:
        """[step, first sequence, sequence after the last] in the order in which they were read."""
        return [facts for _, name, *facts in self.events if name == "step"]


def read_diaries(folder: Path) -> list[Diary]:
    """Reads the diaries of a run, in the order in which their processes began."""
    found = []
    for path in sorted(folder.iterdir()):
        events = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
        if events:
            found.append(Diary(events[0][2], events))
    return sorted(found, key=lambda diary: diary.events[0][0])


def data_faults(diaries: Sequence[Diary], ranks: int, batch: int, last: int) -> list[str]:
    """Returns what is wrong with the order of the data, in words; empty if nothing is.

    Every process must read consecutive steps, begin behind the step that it resumed from, and not before the newest
    step that was saved when it began. Each step from 1 to `last` must have been read by every rank, always the same
    sequences, and these must be `range(batch)`, each once.
    """
    faults = []
    read: dict[int, set[tuple[int, int, int]]] = defaultdict(set)  # by step: rank, first, after the last
    saved = 0
    for diary in diaries:
        numbers = [step for step, *_ in diary.steps]
        begun = [step for _, name, step in (event[:3] for event in diary.events if event[1] == "resumed")]
        if numbers and numbers != list(range(begun[0] + 1, begun[0] + 1 + len(numbers))):
            faults.append(f"rank {diary.rank} resumed from {begun[0]} and read steps {numbers[:3]}...{numbers[-3:]}")
        at = diary.events[0][0]
        saved = max((e[2] for d in diaries for e in d.events if e[1] == "saved" and e[0] < at), default=0)
        if begun and begun[0] < saved:
            faults.append(f"rank {diary.rank} resumed from {begun[0]} although {saved} was saved")
        for step, start, stop in diary.steps:
            read[step].add((diary.rank, start, stop))
    for step in range(1, last + 1):
        parts = sorted(read[step])
        sequences = [index for _, start, stop in parts for index in range(start, stop)]
        if [rank for rank, *_ in parts] != list(range(ranks)) or sequences != list(range(batch)):
            faults.append(f"step {step} was read as {parts}")
    return faults


def repeated_steps(diaries: Sequence[Diary]) -> int:
    """Counts the steps that rank 0 read again after a resume."""
    numbers = [step for diary in diaries if diary.rank == 0 for step, *_ in diary.steps]
    return len(numbers) - len(set(numbers))


def where_time_went(diaries: Sequence[Diary], since: float = 0.0, until: float = math.inf) -> dict[str, float]:
    """Returns seconds of rank 0 between two times, by what it did.

    A step that a later process repeats counts as repeated. What follows the last line of a process, up to the birth of
    the next, counts as its death.

    Args:
        since: seconds since the epoch; what was before is left out.
        until: seconds since the epoch.
    """
    mine = [diary for diary in diaries if diary.rank == 0]
    moments: list[tuple[float, str]] = []  # a time, and what begins then
    for number, diary in enumerate(mine):
        kept = min((d.steps[0][0] for d in mine[number + 1 :] if d.steps), default=10**9)  # from here on: repeated
        step = 0
        moments.append((diary.events[0][3], STARTING))
        for at, name, *facts in diary.events:
            step = facts[0] if name == "step" else step
            moments.append((at, PHASES.get(name, STEPS if step < kept else REPEATED)))
        moments[-1] = (moments[-1][0], ENDING)
    spent: dict[str, float] = defaultdict(float)
    for (begin, what), (end, _) in itertools.pairwise(moments):
        spent[what] += max(min(end, until) - max(begin, since), 0.0)
    return dict(spent)
