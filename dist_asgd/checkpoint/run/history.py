"""The history of a run: one small file for each save, by which saves of several writers get one order.

[Note: history]
Before rank 0 commits a checkpoint, it creates ``history/<number>.json``, whose number is one larger than the largest
that its run had when the writer loaded or saved last. The create is exclusive, so of two writers that go on from one
state exactly one succeeds; the other one is refused before its checkpoint exists, and its error names the first.

The file lists the checkpoints that are abandoned: the run went back to an older step, and what was saved after that
step does not lead to what is being saved. A reader needs only the file with the largest number, because each has the
whole list. So retention deletes older files.

Why this way, and not a lease with heartbeats:

- All stores can create exclusively; few have locks, and clocks of hosts and stores may be off by years.
- Nothing waits. A job whose predecessor was killed loads and saves at once, because loading takes the largest number.
  If the predecessor lives after all, whoever saves second is refused, and nothing that was committed is lost.
- A crash leaves a consistent run. Before the file exists, nothing has changed. Afterwards, the abandoned checkpoints
  are abandoned even if the save that says so was not committed: the run is then at the step to which it went back, and
  the abandoned checkpoints are still there to be loaded by their step.

Because older files are deleted, the number after that of a writer that slept for long may be free again. So a writer
looks for larger numbers after its create; there is one then, because the largest is never deleted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from dist_asgd.checkpoint.errors import CheckpointError

HISTORY = "history"  # the folder below the URL of a run
FORMAT = "dist_asgd history"
_NAME = re.compile(r"(\d{8,18})\.json")
_TYPES: dict[str, Any] = {
    "number": int,
    "step": int,
    "directory": str,
    "abandoned": list,
    "saved": (int, float),
    "writer": str,
    "host": str,
    "process": int,
    "since": (int, float),
}


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One save: who made it, and which checkpoints are abandoned from then on."""

    number: int
    step: int
    directory: str  # of the checkpoint that was about to be committed, relative to the URL of the run
    abandoned: tuple[str, ...]  # directories of checkpoints, relative to the URL of the run
    saved: float  # when, in seconds since the epoch by the writer's clock; only messages use it
    writer: str  # a random name of the Checkpointer, by which it recognises its own entries
    host: str
    process: int  # id of rank 0's process on the host
    since: float  # when the Checkpointer was made, in seconds since the epoch by the writer's clock

    def who(self) -> str:
        """Returns the writer's host, process and age for messages."""
        return f"process {self.process} on host {self.host}, at work since {_utc(self.since)}"

    def what(self) -> str:
        """Returns the step and the time of the save for messages."""
        return f"step {self.step} at {_utc(self.saved)}"


def entry_path(number: int) -> str:
    """Returns the path of an entry relative to the URL of the run."""
    return f"{HISTORY}/{number:08d}.json"


def entry_numbers(paths: Iterable[str]) -> list[int]:
    """Returns the numbers of the entries among ``paths``, which are relative to the URL of the run, ascending."""
    names = (path.removeprefix(f"{HISTORY}/") for path in paths if path.startswith(f"{HISTORY}/"))
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def write_entry(entry: HistoryEntry) -> bytes:
    """Returns the bytes of an entry's file: JSON with the SHA-256 of the entry's own JSON."""
    text = json.dumps({"format": FORMAT, **asdict(entry)})
    return json.dumps({"entry": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}).encode()


def read_entry(data: bytes, url: str) -> HistoryEntry:
    """Returns the entry in the bytes of its file.

    Args:
        url: of the file, for errors.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        whole = json.loads(data)
        text = whole["entry"]
        if hashlib.sha256(text.encode()).hexdigest() != whole["sha256"]:
            raise ValueError("its contents do not have the sha256 that stands in it")
        record = json.loads(text)
        if record.pop("format") != FORMAT or any(not isinstance(record[name], _TYPES[name]) for name in _TYPES):
            raise ValueError(f"it is no {FORMAT}")
        known = {name: record[name] for name in _TYPES}
        return HistoryEntry(**{**known, "abandoned": tuple(map(str, known["abandoned"]))})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{url} is damaged ({error}): it says which checkpoints the run has abandoned. If you delete it, all of "
            "them count again; look at them by `dist-asgd ls` then"
        ) from error


def _utc(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return f"{seconds} s since 1970"
