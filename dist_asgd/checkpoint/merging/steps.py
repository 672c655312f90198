"""Selects steps of a run by a list of numbers or by a text such as ``1000:2000:100``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from dist_asgd.checkpoint.errors import CheckpointError

_RANGE = re.compile(r"(\d{1,18})?:(\d{1,18})?(?::(\d{1,18}))?")
MAX_STEPS = 10**5  # steps that a text may name


def parse_steps(steps: object) -> Sequence[int | range | slice]:
    """Returns the parts of a selection: a step, a range of steps that must all exist, or a slice of those that exist.

    Args:
        steps: an iterable of steps, or a text of parts joined by commas. A part is a step (``1000``), the steps from
            one to another, both included, at a distance (``1000:2000:100``), or all steps that exist from one to
            another, both included (``1000:2000``), where either may be left out.

    Raises:
        ValueError, TypeError: ``steps`` is no such selection.
    """
    if isinstance(steps, str):
        return [_part(text) for text in steps.split(",")]
    if isinstance(steps, bytes) or not isinstance(steps, Iterable):
        raise TypeError(f"steps must be a text like '1000:2000:100' or whole numbers, got {steps!r}")
    found = list(steps)
    for step in found:
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"steps must be whole numbers of at least 0, got {step!r}")
    if not found:
        raise ValueError("steps is empty: name the steps to merge")
    return found


def _part(text: str) -> int | range | slice:
    text = text.strip()
    if text.isascii() and text.isdecimal():
        return int(text)
    found = _RANGE.fullmatch(text)
    if not found or not text.isascii():
        raise ValueError(f"{text!r} names no steps: expected 1000, 1000:2000:100 or 1000:2000")
    first, last, distance = (None if number is None else int(number) for number in found.groups())
    if distance is None:
        return slice(first, last)
    if first is None or last is None or distance == 0 or last < first or (last - first) // distance >= MAX_STEPS:
        raise ValueError(f"{text!r} names no steps: expected FIRST:LAST:DISTANCE, such as 1000:2000:100")
    return range(first, last + 1, distance)


def select_steps(parts: Sequence[int | range | slice], known: Sequence[int], url: str) -> list[int]:
    """Returns the selected steps in the order of ``parts``.

    Args:
        parts: from ``parse_steps``.
        known: the steps that the run has, ascending.
        url: of the run, for errors.

    Raises:
        CheckpointError: steps do not exist, are selected twice, or nothing is selected.
    """
    selected: list[int] = []
    for part in parts:
        if isinstance(part, slice):
            inside = [step for step in known if (part.start or 0) <= step and (part.stop is None or step <= part.stop)]
            if not inside:
                raise CheckpointError(f"{url} has no steps in {part.start or 0}:{part.stop}; it has {_listed(known)}")
            selected += inside
        else:
            selected += [part] if isinstance(part, int) else part
    if missing := sorted(set(selected) - set(known)):
        raise CheckpointError(
            f"{url} has no checkpoint of step {_listed(missing)}; it has {_listed(known)}. FIRST:LAST without a "
            "distance takes those that exist"
        )
    if len(set(selected)) < len(selected):
        twice = sorted({step for step in selected if selected.count(step) > 1})
        raise CheckpointError(f"steps {_listed(twice)} of {url} are selected twice: use weights to count one more")
    return selected


def _listed(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[:20]))
    return f"{shown}, ... ({len(steps)} in all)" if len(steps) > 20 else shown or "none"
