"""XXX docstring."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dist_asgd.averages.kinds import Average, Tail, Uniform

TORCHS = repr(Uniform())


FIRST = "average"  # the name of the first, if it was given none


STATE = ("step", "eta", "mu", "ax", "master")  # what else the state of a parameter has


_NAMED = re.compile(r"(\w+)=(?=\w+\()")  # how the text of averages begins whose first one has a name


_NEXT = re.compile(r", (?=\w+=\w+\()")  # what stands between two of them


def named_averages(average: object) -> dict[str, Average]:
    """What the optimizer's ``average`` says, by name; the first is torch's ``ax``.

    Raises ``TypeError``, or ``ValueError`` for names and averages that cannot be held beside each other.
    """
    if average is None:
        average = Uniform()
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


def by_suffix(averages: Mapping[str, Average]) -> dict[str, Average]:
    """By what follows ``ax`` and ``mu`` in the state: nothing for the first, as in torch; names of the others."""
    return {f"_{name}" if number else "": kind for number, (name, kind) in enumerate(averages.items())}


def suffix_of(averages: Mapping[str, Average], name: object) -> str:
    """The same of the average of that ``name``; None for the first. Raises ``ValueError`` where there is none."""
    if name is not None and name not in averages:
        raise ValueError(f"there is no average {name!r}; this optimizer has {', '.join(map(repr, averages))}")
    return "" if name in (None, next(iter(averages))) else f"_{name}"


def group_options(averages: Mapping[str, Average]) -> dict[str, Any]:
    """What param groups, and so state dicts, say of the averages: nothing, if it is torch's.

    ``restarted``: whether all of them begin at ``t0``, also a ``Tail`` that would begin later.
    """
    named = len(averages) > 1 or FIRST not in averages
    text = ", ".join(f"{name}={kind!r}" if named else repr(kind) for name, kind in averages.items())
    options: dict[str, Any] = {} if text == TORCHS else {"average": text}
    return options | ({"restarted": False} if any(isinstance(kind, Tail) for kind in averages.values()) else {})


def average_of(group: Mapping[str, Any]) -> str:
    """What a param group says of the averages."""
    return str(group.get("average", TORCHS))


def first_name(text: str) -> str:
    """The name of the first of the averages that a param group has as ``text``."""
    found = _NAMED.match(text)
    return FIRST if found is None else found[1]


def same_averages(text: str, other: str) -> bool:
    """Whether what two param groups say means the same state: the first has any name, others stand in any order."""
    (first, *rest), (second, *others) = (re.split(_NEXT, said) for said in (text, other))
    first, second = (said.removeprefix(f"{first_name(said)}=") for said in (first, second))
    return first == second and sorted(rest) == sorted(others)


def check_average(group: Mapping[str, Any], number: int, averages: Mapping[str, Average]) -> None:
    """Raises ``ValueError`` where param group ``number`` cannot have them, or asks for others."""
    expected = average_of(group_options(averages))
    if average_of(group) != expected:
        found = group["average"]
        raise ValueError(f"group {number} has average={found!r}: it is an option of the optimizer, for all groups")
    if group["capturable"] and not same_averages(expected, TORCHS):
        raise ValueError(
            f"average {expected} with capturable=True: the steps of a CUDA graph compute mu on the device, where only "
            "torch's average is known. Leave out one of the two"
        )
