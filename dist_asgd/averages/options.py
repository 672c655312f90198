"""Validates the optimizer's ``average`` option, and writes and reads it as text in param groups."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dist_asgd.averages.kinds import Average, Tail, TwoTailed, Uniform

TORCHS = repr(Uniform())  # the text of torch.optim.ASGD's average


PROGRESS = "progress"  # key of the counts in the state dict of ``ShardedAverages``, beside those of the averages


AVERAGE, COPY = "average", "copy"  # what ``ShardedAverages`` does with a buffer


FIRST = "average"  # the name of the first average if it was given none


STATE = ("step", "eta", "mu", "ax", "master")  # keys of a parameter's state, which no average may have as its name


_NAMED = re.compile(r"(\w+)=(?=\w+\()")  # matches the name at the head of a text such as "fast=EMA(...), slow=..."


_NEXT = re.compile(r", (?=\w+=\w+\()")  # matches the separator between two averages in such a text


def named_averages(average: object) -> dict[str, Average]:
    """Returns the averages that the optimizer's ``average`` option means, by name. The state has the first as ``ax``.

    Args:
        average: None for torch's, an ``Average``, or a mapping of names to averages.

    Raises:
        TypeError: ``average`` is something else.
        ValueError: the mapping is empty, a name is no identifier or is in ``STATE``, or two averages are equal.
    """
    if average is None:
        average = Uniform()
    if isinstance(average, TwoTailed) or (
        isinstance(average, Mapping) and any(isinstance(kind, TwoTailed) for kind in average.values())
    ):
        raise ValueError(
            "TwoTailed needs the losses of evaluations, which an optimizer is not told: pass it to ShardedAverages as "
            "its only average, and tell compare_tails() the losses"
        )
    averages: dict[Any, Any] = dict(average) if isinstance(average, Mapping) else {FIRST: average}
    if not averages:
        raise ValueError("average is an empty mapping: name at least one, or pass None for torch's")
    names: dict[Average, str] = {}
    for name, kind in averages.items():
        if not isinstance(kind, Average):
            raise TypeError(
                "average must be None, an average (dist_asgd.EMA(0.999), ...) or a mapping of names to averages, got "
                f"{average!r}"
            )
        if not isinstance(name, str) or not name.isidentifier() or name in STATE:
            raise ValueError(
                f"the name of an average must be an identifier, since the state has it as ax_<name>, and none of "
                f"{', '.join(STATE)}; got {name!r}"
            )
        if (other := names.setdefault(kind, name)) != name:
            raise ValueError(f"averages {other!r} and {name!r} are both {kind!r}, so they are the same: leave out one")
    return averages


def beside_optimizer(average: object) -> dict[str, Average]:
    """Returns the averages that the ``average`` argument of ``ShardedAverages`` means, by name.

    Args:
        average: an ``Average``, or a mapping of names to averages. ``TwoTailed`` alone is its two tails.

    Raises:
        TypeError, ValueError: as ``named_averages``; a name is ``PROGRESS``.
    """
    if isinstance(average, TwoTailed):
        return average.tails
    if isinstance(average, Mapping) and any(isinstance(kind, TwoTailed) for kind in average.values()):
        raise ValueError("TwoTailed is two averages by itself, 'short' and 'long': pass it alone, not in a mapping")
    if average is None:
        raise TypeError("average must be an average (dist_asgd.EMA(0.999), ...) or a mapping of names to averages")
    averages = named_averages(average)
    if PROGRESS in averages:
        raise ValueError(f"an average cannot have the name {PROGRESS!r}, under which the state dict has its counts")
    return averages


def by_suffix(averages: Mapping[str, Average]) -> dict[str, Average]:
    """Returns the averages by the suffix of ``ax`` and ``mu`` in the state: "" for the first, "_name" for others."""
    return {f"_{name}" if number else "": kind for number, (name, kind) in enumerate(averages.items())}


def suffixes_of(averages: Mapping[str, Average]) -> dict[str, str]:
    """Returns the suffix, as in ``by_suffix``, of each average, by its name."""
    return dict(zip(averages, by_suffix(averages), strict=True))


def suffix_of(averages: Mapping[str, Average], name: object) -> str:
    """Returns the suffix, as in ``by_suffix``, of the average ``name``, or of the first average if it is None.

    Raises ``ValueError`` if there is no average of that name.
    """
    if name is not None and name not in averages:
        raise ValueError(f"there is no average {name!r}; there are {', '.join(map(repr, averages))}")
    return "" if name in (None, next(iter(averages))) else f"_{name}"


def group_options(averages: Mapping[str, Average]) -> dict[str, Any]:
    """Returns the entries of a param group that describe the averages; none for torch's average alone.

    ``average`` is the averages as text. ``restarted``, which exists if there is a ``Tail``, says whether every average
    starts at ``t0``, even a ``Tail`` that would start later.
    """
    named = len(averages) > 1 or FIRST not in averages
    text = ", ".join(f"{name}={kind!r}" if named else repr(kind) for name, kind in averages.items())
    options: dict[str, Any] = {} if text == TORCHS else {"average": text}
    return options | ({"restarted": False} if any(isinstance(kind, Tail) for kind in averages.values()) else {})


def average_of(group: Mapping[str, Any]) -> str:
    """Returns the averages of a param group as text."""
    return str(group.get("average", TORCHS))


def first_name(text: str) -> str:
    """Returns the name of the first average in ``text``, a param group's."""
    found = _NAMED.match(text)
    return FIRST if found is None else found[1]


def same_averages(text: str, other: str) -> bool:
    """Returns whether two texts mean equal state: the first average may have any name, the others any order."""
    (first, *rest), (second, *others) = (re.split(_NEXT, said) for said in (text, other))
    first, second = (said.removeprefix(f"{first_name(said)}=") for said in (first, second))
    return first == second and sorted(rest) == sorted(others)


def check_average(group: Mapping[str, Any], number: int, averages: Mapping[str, Average]) -> None:
    """Raises ``ValueError`` if param group ``number`` names other averages, or has an option that excludes them."""
    expected = average_of(group_options(averages))
    if average_of(group) != expected:
        found = group["average"]
        raise ValueError(f"group {number} has average={found!r}: it is an option of the optimizer, for all groups")
    if group["capturable"] and not same_averages(expected, TORCHS):
        raise ValueError(
            f"average {expected} with capturable=True: the steps of a CUDA graph compute mu on the device, where only "
            "torch's average is known. Leave out one of the two"
        )
