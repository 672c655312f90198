"""What the log says while much is saved or loaded. It needs no thread: whoever moves bytes tells of them."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger(__name__)

EVERY = 10.0  # seconds: before the first line, and between lines


class Progress:
    """Told of bytes that were written or read; of what takes long, it says so in the log from time to time.

    Args:
        doing: what is being done, for a line of the log.
        total: bytes.
        rank: only rank 0 says anything. It tells of its own share, which is about as large as others'.
    """

    def __init__(self, doing: str, total: int, rank: int) -> None:
        self._doing, self._total, self._is_silent = doing, total, rank != 0
        self._done = 0
        self._begun = self._said = time.monotonic()

    def add(self, count: int) -> None:
        """``count`` more bytes are done."""
        self._done += count
        now = time.monotonic()
        if self._is_silent or now - self._said < EVERY:
            return
        self._said = now
        done, total, rate = (number / 2**20 for number in (self._done, self._total, self._done / (now - self._begun)))
        logger.info("%s: %.1f of %.1f MiB of rank 0's share, %.1f MiB/s", self._doing, done, total, rate)
