"""``Timing``: when averages begin, and the ``mu`` of each after a number of iterates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dist_asgd.asgd.schedule import Scalars
from dist_asgd.averages.kinds import Average


class Timing:
    """Counts the updates of the averages that follow one optimizer, and computes their ``mu``.

    Averages begin with the first update that finds ``updates >= start``. Parameters that joined later, or were frozen
    for a while, have fewer iterates than others.

    Args:
        kinds: the kinds of average by name.
        start: updates before the first iterate counts; ``math.inf`` until ``restart``.

    Attributes:
        updates: the updates so far.
        restarted: whether every average has begun at ``start``, even a ``Tail`` that would begin later.
        firsts: the update from which an average counts iterates, by name, where that is not ``start``.
    """

    def __init__(self, kinds: Mapping[str, Average], start: float) -> None:
        self.kinds, self.start = dict(kinds), start
        self.updates, self.restarted = 0, False
        self.firsts: dict[str, int] = {}

    @property
    def is_waiting(self) -> bool:
        """Whether the next update is before the start."""
        return self.updates < self.start

    def restart(self, *, even_later_ones: bool) -> None:
        """Lets averages begin with the next update; ``even_later_ones`` includes a ``Tail`` that would begin later."""
        self.start, self.restarted = float(self.updates), even_later_ones
        self.firsts.clear()

    def promote(self, source: str, target: str) -> None:
        """Gives the average ``target`` the iterates of ``source``, which begins anew with the next update."""
        self.firsts = {target: self.firsts.get(source, 0), source: self.updates}

    def scalars(self, iterates: int, updates: int) -> Scalars:
        """Returns the scalars of a parameter after ``iterates`` iterates, the last of which was update ``updates``."""
        if not iterates:
            return Scalars(0, 0.0, (1.0,) * len(self.kinds))
        joined = updates - iterates
        return Scalars(iterates, 0.0, tuple(self._mu(name, updates, joined) for name in self.kinds))

    def _mu(self, name: str, updates: int, joined: int) -> float:
        first = max(joined, self.firsts.get(name, 0))
        return float(self.kinds[name].mu(updates, first - 1, self.restarted))

    def state(self) -> dict[str, Any]:
        """Returns the counts and starts, but not the kinds, as plain data."""
        start = None if math.isinf(self.start) else self.start
        return {"updates": self.updates, "start": start, "restarted": self.restarted, "firsts": dict(self.firsts)}

    @classmethod
    def of(cls, kinds: Mapping[str, Average], state: Mapping[str, Any]) -> Timing:
        """Returns a timing with the counts and starts that ``state()`` has returned."""
        start = state["start"]
        timing = cls(kinds, math.inf if start is None else float(start))
        timing.updates, timing.restarted = int(state["updates"]), bool(state["restarted"])
        timing.firsts = {str(name): int(first) for name, first in (state.get("firsts") or {}).items()}
        return timing
