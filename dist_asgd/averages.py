"""Kinds of average: how far the average moves towards each iterate.

An average is one recursion, ``ax = ax + (p - ax) * mu``, for every iterate ``p`` (rule.py); the kinds differ in ``mu``
only. It is computed here in double, from the number of steps and the ``t0`` of the param group. As in torch, step
``t0 + 2`` gives the first iterate of an average: its ``mu`` is 1, as are those of all steps before.
"""

from __future__ import annotations

import math
import numbers
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Average(ABC):
    """What all kinds have in common.

    Args:
        every: the average takes the first iterate, and from there on one of so many; the steps between leave it alone
            and cost what steps without an average do.

    Raises:
        ValueError, TypeError: options out of range; so do all kinds.
    """

    every: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int):
            raise TypeError(f"every must be an int, got {self.every!r}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")

    @abstractmethod
    def weight(self, n: float) -> float:
        """Of the newest of ``n`` iterates in their average, ``n`` > 1: in (0, 1]."""

    def start(self, t0: float) -> float:
        """``t0``, or later."""
        return t0

    def mu(self, steps: int, t0: float, restarted: bool = False) -> float:
        """Of the step that follows ``steps`` steps: in [0, 1]; 0: it leaves the average alone.

        Args:
            restarted: ``t0`` itself is the start.
        """
        n = steps - (t0 if restarted else self.start(t0))
        if n <= 1:
            return 1.0
        if self.every == 1:
            return self.weight(n)
        taken, rest = divmod(math.ceil(n) - 1, self.every)
        return 0.0 if rest else self.weight(taken + 1)


@dataclass(frozen=True)
class Uniform(Average):
    """The mean of all iterates: torch.optim.ASGD's average, and the default.

    Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992.
    """

    def weight(self, n: float) -> float:
        return 1 / n


@dataclass(frozen=True)
class EMA(Average):
    """Exponential moving average: the weight of an iterate falls by the factor ``decay`` with each that comes after it.

    Args:
        decay: in (0, 1).
        warmup: whether the iterates that there are share the whole weight, so that the first ones count no more than
            later ones: the decay then begins with 0 and grows to ``decay``. It is Adam's bias correction (Kingma and
            Ba, 2015). Without, the first iterate keeps the weight of all that came before it.
    """

    decay: float
    warmup: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _in_range(self, "decay", 0, 1, "in (0, 1)")
        if self.decay == 1:
            raise ValueError("decay must be a number in (0, 1), got 1")
        if not isinstance(self.warmup, bool):
            raise TypeError(f"warmup must be True or False, got {self.warmup!r}")

    def weight(self, n: float) -> float:
        whole = -math.expm1(n * math.log(self.decay)) if self.warmup else 1.0
        return min(1.0, (1 - self.decay) / whole)


@dataclass(frozen=True)
class PolynomialDecay(Average):
    """Weights that grow about as the ``gamma``-th power of the iterate's number: younger ones count more.

    It needs to know neither the length of the training nor a scale: the average is always one of about the latest
    ``1 / (gamma + 1)`` of the training. Shamir and Zhang, "Stochastic gradient descent for non-smooth optimization",
    2013; for many iterates it is the power function EMA of Karras et al., "Analyzing and improving the training
    dynamics of diffusion models" (EDM2), 2024.

    Args:
        gamma: > 0; ``Uniform()`` is what 0 would be.
    """

    gamma: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _in_range(self, "gamma", 0, math.inf, "> 0 and finite")

    def weight(self, n: float) -> float:
        return (self.gamma + 1) / (n + self.gamma)


@dataclass(frozen=True)
class Tail(Average):
    """The mean of the last iterates of a training whose length is known (suffix averaging).

    Rakhlin, Shamir and Sridharan, "Making gradient descent optimal for strongly convex stochastic optimization", 2012.
    Where the length is not known, ``PolynomialDecay`` does about the same.

    Args:
        fraction: of the ``steps``, in (0, 1].
        steps: of the training, counted from its first; a parameter's own. The average goes on if there are more.
    """

    fraction: float
    steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _in_range(self, "fraction", 0, 1, "in (0, 1]")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int):
            raise TypeError(f"steps must be an int, got {self.steps!r}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def start(self, t0: float) -> float:
        return max(t0, self.steps - 1 - round(self.fraction * self.steps))

    def weight(self, n: float) -> float:
        return 1 / n


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


def _in_range(average: Average, name: str, low: float, high: float, expected: str) -> None:
    """``low`` itself is out of range. Makes it a float, so that equal averages have one text."""
    value = getattr(average, name)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not low < float(value) <= high or math.isinf(value):
        raise ValueError(f"{name} must be a number {expected}, got {value!r}")
    object.__setattr__(average, name, float(value))
