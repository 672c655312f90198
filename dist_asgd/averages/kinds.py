"""Kinds of average: how far the average moves towards each iterate.

An average is one recursion, ``ax = ax + (p - ax) * mu``, for every iterate ``p`` (rule.py); the kinds differ in ``mu``
only. It is computed here in double, from the number of steps and the ``t0`` of the param group. As in torch, step
``t0 + 2`` gives the first iterate of an average: its ``mu`` is 1, as are those of all steps before.
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from dataclasses import dataclass


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


def _in_range(average: Average, name: str, low: float, high: float, expected: str) -> None:
    """``low`` itself is out of range. Makes it a float, so that equal averages have one text."""
    value = getattr(average, name)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not low < float(value) <= high or math.isinf(value):
        raise ValueError(f"{name} must be a number {expected}, got {value!r}")
    object.__setattr__(average, name, float(value))
