"""Time things on a machine that others use too: wait for a lull, and know afterwards whether it lasted."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LULL = 0.1  # share of all processors' time that others may use
_TICKS = os.sysconf("SC_CLK_TCK")


def undisturbed(measure: Callable[[], Any], patience: float) -> tuple[Any, float]:
    """``measure()``, which works in child processes and waits for them, in a lull; and what others used meanwhile.

    Waits for a lull, and measures again when it did not last. ``patience`` seconds after the call the next result is
    taken as it comes. The second value is the share of all processors' time that other processes used: 0.0 to 1.0.
    """
    deadline = time.monotonic() + patience
    while True:
        while time.monotonic() < deadline and _foreign(lambda: time.sleep(1.0))[1] > LULL:
            pass
        result, foreign = _foreign(measure)
        if foreign <= LULL or time.monotonic() >= deadline:
            return result, foreign


def _foreign(measure: Callable[[], Any]) -> tuple[Any, float]:
    start, busy, own = time.monotonic(), _busy(), _own()
    result = measure()
    used = (_busy() - busy) - (_own() - own)
    return result, max(0.0, used / ((time.monotonic() - start) * (os.cpu_count() or 1)))


def _busy() -> float:
    """Processor seconds that all processes of the machine have used: user, nice and system."""
    user, nice, system = Path("/proc/stat").read_text().split()[1:4]
    return (int(user) + int(nice) + int(system)) / _TICKS


def _own() -> float:
    """Processor seconds of this process and of its children that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usage)
