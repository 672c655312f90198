"""``step``, ``eta`` and ``mu`` of the parameters of a bucket, kept for runs of neighbours in which they are equal.

That is one run as long as all parameters get gradients. Those that lie on a device (``DeviceScalars``) are not
compared; runs that were cut there stay apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dist_asgd.asgd.schedule import AnyScalars


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring parameters ``[first, stop)`` of a bucket whose scalars are equal."""

    first: int
    stop: int
    scalars: AnyScalars


def select_runs(runs: Sequence[Run], active: Sequence[bool] | None) -> list[tuple[Run, bool]]:
    """Cuts ``runs`` where ``active`` changes; None means that every parameter is active."""
    if active is None:
        return [(run, True) for run in runs]
    result = []
    for run in runs:
        first = run.first
        for position in range(run.first + 1, run.stop + 1):
            if position == run.stop or active[position] != active[first]:
                scalars = run.scalars if first == run.first else run.scalars.copy()
                result.append((Run(first, position, scalars), active[first]))
                first = position
    return result


def merge_runs(runs: Iterable[Run]) -> list[Run]:
    """Joins neighbours with equal scalars."""
    result: list[Run] = []
    for run in runs:
        if result and result[-1].scalars == run.scalars:
            run = Run(result.pop().first, run.stop, run.scalars)
        result.append(run)
    return result
