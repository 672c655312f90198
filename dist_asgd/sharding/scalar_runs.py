"""``step``, ``eta`` and ``mu`` of the parameters of a bucket, kept once for each run of neighbours with equal values.

A bucket has one run as long as all its parameters get gradients in every step. Scalars on a device (``DeviceScalars``)
compare as different, since reading them would wait for the device; so runs that were cut stay apart.
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
    """Cuts ``runs`` where ``active`` changes, and returns each part with whether its parameters are active.

    Args:
        runs: the runs of a bucket, in order.
        active: one flag for each parameter of the bucket; None if all are active.
    """
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
    """Joins neighbouring runs with equal scalars."""
    result: list[Run] = []
    for run in runs:
        if result and result[-1].scalars == run.scalars:
            run = Run(result.pop().first, run.stop, run.scalars)
        result.append(run)
    return result
