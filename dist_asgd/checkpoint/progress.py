"""Logs the progress of long saves and loads, without a thread: whoever moves bytes reports them."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger(__name__)

EVERY = 10.0  # seconds before the first line of the log, and between lines


class Progress:
    """Counts the bytes that one rank has written or read, and logs a line every ``EVERY`` seconds.

    Args:
        doing: the operation and its URL, which begin the line.
        total: bytes that this rank writes or reads in all.
        rank: this rank. Rank 0 alone logs; its own share of the bytes is about as large as those of other ranks.
    """

    def __init__(self, doing: str, total: int, rank: int) -> None:
        self._doing, self._total, self._is_silent = doing, total, rank != 0
        self._done = 0
        self._begun = self._said = time.monotonic()

    def add(self, count: int) -> None:
        """Adds ``count`` bytes to those written or read."""
        self._done += count
        now = time.monotonic()
        if self._is_silent or now - self._said < EVERY:
            return
        self._said = now
        done, total, rate = (number / 2**20 for number in (self._done, self._total, self._done / (now - self._begun)))
        logger.info("%s: %.1f of %.1f MiB of rank 0's share, %.1f MiB/s", self._doing, done, total, rate)
