"""Counts what ``Checkpointer.metrics`` returns of saves."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class SaveCounts:
    """Counts the saves of one rank. One save is under way at a time, so that no two threads count at once."""

    def __init__(self) -> None:
        self._saves = self._failed = self._bytes = 0
        self._blocked = 0.0  # seconds
        self._last: float | None = None  # time.monotonic() when the checkpoint saved or loaded last was committed
        self.lost_steps: int | None = None  # at the last load, on rank 0

    def metrics(self) -> dict[str, float]:
        """Returns the numbers by name; what is not known yet is missing."""
        found: dict[str, float] = {"saves": self._saves, "failed_saves": self._failed}
        found |= {"blocked_seconds": self._blocked, "written_bytes": self._bytes}
        if self._last is not None:
            found["seconds_since_save"] = time.monotonic() - self._last
        if self.lost_steps is not None:
            found["lost_steps"] = self.lost_steps
        return found

    @contextlib.contextmanager
    def blocked(self) -> Iterator[None]:
        """Counts the seconds of a block during which the training waits."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self._blocked += time.monotonic() - begun

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """Counts a failed save if the block raises."""
        try:
            yield
        except BaseException:
            self._failed += 1
            raise

    def committed(self, written: int) -> None:
        """Counts a save that is committed, and the bytes that this rank has written for it."""
        self._saves += 1
        self._bytes += written
        self._last = time.monotonic()

    def loaded(self, created: float) -> None:
        """Takes the age of a checkpoint that was loaded; ``created`` is in seconds since the epoch."""
        self._last = time.monotonic() - max(time.time() - created, 0.0)  # 0: the clock of another host may be ahead
