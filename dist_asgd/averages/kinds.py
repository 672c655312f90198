"""The kinds of average that users choose from: each computes ``mu``, by which the average moves towards an iterate.

Every average is the recursion ``ax = ax + (p - ax) * mu`` over the iterates ``p`` (asgd/rule.py); kinds differ only in
``mu``. It is computed in double from the number of steps and the ``t0`` of the param group. As in torch.optim.ASGD,
step ``t0 + 2`` gives the first iterate of an average: ``mu`` is 1 at this step and at all steps before.
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from dataclasses import InitVar, dataclass, field


@dataclass(frozen=True, kw_only=True)
class Average(ABC):
    """The base class of all kinds of average, which are immutable and compared by their options.

    Args:
        every: the average takes the first iterate and from there on every ``every``-th one. The steps between do not
            touch the average, and cost as much as steps without one.

    Raises:
        ValueError, TypeError: here and in every kind, if an option is out of range or of a wrong type.
    """

    every: int = 1

    def __post_init__(self) -> None:
        _at_least_1("every", self.every)

    @abstractmethod
    def weight(self, n: float) -> float:
        """Returns the weight, in (0, 1], of the newest of ``n`` > 1 iterates in their average."""

    def start(self, t0: float) -> float:
        """Returns the step count after which averaging starts, at least ``t0``."""
        return t0

    def mu(self, steps: int, t0: float, restarted: bool = False) -> float:
        """Returns the ``mu`` of the step that follows ``steps`` steps, in [0, 1]; with 0 the average stays unchanged.

        Args:
            steps: the steps that the parameter has taken.
            t0: the option of the param group.
            restarted: whether averaging starts at ``t0`` even if this kind would start later.
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
    """The mean of all iterates from step ``t0 + 2`` on: the average of torch.optim.ASGD, and the default.

    Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992.
    """

    def weight(self, n: float) -> float:
        return 1 / n


@dataclass(frozen=True, repr=False)
class EMA(Average):
    """The exponential moving average: each new iterate multiplies the weights of those before it by ``decay``.

    Exactly one of ``decay``, ``half_life`` and ``half_life_fraction`` is given.

    Args:
        decay: in (0, 1).
        warmup: whether the weights of the iterates so far are scaled to add up to 1, so that the first iterate counts
            no more than later ones. The effective decay then grows from 0 to ``decay``, as by Adam's bias correction
            (Kingma and Ba, 2015). Without warmup, the first iterate has the weight of all iterates before it as well.
        half_life: the number of steps, > 0, after which an iterate counts half as much: ``decay`` is
            ``2 ** (-every / half_life)``.
        half_life_fraction: the half-life as a fraction, > 0, of the iterates so far, so that it grows with the run:
            the decay of iterate n is ``2 ** (-1 / (half_life_fraction * n))``, as in torchtitan. It needs no warmup.
    """

    decay: float | None = None
    warmup: bool = True
    half_life: InitVar[float | None] = None
    half_life_fraction: float | None = field(default=None, kw_only=True)

    def __post_init__(self, half_life: float | None) -> None:  # type: ignore[override]
        super().__post_init__()
        given = {"decay": self.decay, "half_life": half_life, "half_life_fraction": self.half_life_fraction}
        if len(named := [name for name, value in given.items() if value is not None]) != 1:
            found = " and ".join(named) or "none of them"
            raise ValueError(f"EMA takes one of decay, half_life and half_life_fraction, got {found}")
        if not isinstance(self.warmup, bool):
            raise TypeError(f"warmup must be True or False, got {self.warmup!r}")
        if self.half_life_fraction is not None:
            _in_range(self, "half_life_fraction", 0, math.inf, "> 0 and finite")
            if not self.warmup:
                raise ValueError("warmup=False with half_life_fraction: its decay grows from 0 by itself. Leave it out")
            return
        if half_life is not None:
            object.__setattr__(self, "decay", 2.0 ** (-self.every / _number("half_life", half_life)))
        _in_range(self, "decay", 0, 1, "in (0, 1)")
        if self.decay == 1:
            raise ValueError(f"decay must be a number in (0, 1), got 1{' from half_life' * (half_life is not None)}")

    def __repr__(self) -> str:  # written into checkpoints, so that it stays as it was before half_life_fraction
        if self.half_life_fraction is not None:
            return f"EMA(every={self.every!r}, half_life_fraction={self.half_life_fraction!r})"
        return f"EMA(every={self.every!r}, decay={self.decay!r}, warmup={self.warmup!r})"

    def weight(self, n: float) -> float:
        if self.half_life_fraction is not None:
            return -math.expm1(-math.log(2) / (self.half_life_fraction * n))
        decay = float(self.decay or 0)
        whole = -math.expm1(n * math.log(decay)) if self.warmup else 1.0
        return min(1.0, (1 - decay) / whole)


@dataclass(frozen=True)
class PolynomialDecay(Average):
    """Polynomial-decay averaging: weights grow about as the ``gamma``-th power of the iterate's number.

    The length of the training need not be known: the average is always over about the latest ``1 / (gamma + 1)`` of the
    training so far. Shamir and Zhang, "Stochastic gradient descent for non-smooth optimization", 2013. For many
    iterates it is the power function EMA of Karras et al., "Analyzing and improving the training dynamics of diffusion
    models" (EDM2), 2024.

    Args:
        gamma: > 0. With 0 it would be ``Uniform()``.
    """

    gamma: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _in_range(self, "gamma", 0, math.inf, "> 0 and finite")

    def weight(self, n: float) -> float:
        return (self.gamma + 1) / (n + self.gamma)


@dataclass(frozen=True)
class Tail(Average):
    """Suffix averaging: the mean of the last iterates of a training whose length is known.

    Rakhlin, Shamir and Sridharan, "Making gradient descent optimal for strongly convex stochastic optimization", 2012.
    If the length is not known, ``PolynomialDecay`` is about equivalent.

    Args:
        fraction: the fraction of ``steps`` that is averaged, in (0, 1].
        steps: the number of steps of the whole training, counted for each parameter by itself. Averaging continues if
            there are more.
    """

    fraction: float
    steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _in_range(self, "fraction", 0, 1, "in (0, 1]")
        _at_least_1("steps", self.steps)

    def start(self, t0: float) -> float:
        return max(t0, self.steps - 1 - round(self.fraction * self.steps))

    def weight(self, n: float) -> float:
        return 1 / n


@dataclass(frozen=True)
class TwoTailed(Average):
    """Two uniform averages, of a short and of a long tail of the iterates, of which evaluation losses tell the better.

    For ``ShardedAverages`` only. At each evaluation both are evaluated, and ``compare_tails`` is told the losses. Where
    the short tail is at least as good, the long one becomes it and the short one begins anew. So neither the start of
    averaging nor a decay has to be chosen. Melis, "Two-tailed averaging: anytime, adaptive, once-in-a-while optimal
    weight averaging for better generalization", arXiv 2209.12581.
    """

    def weight(self, n: float) -> float:
        return 1 / n

    @property
    def tails(self) -> dict[str, Average]:
        """The two averages by name."""
        return {"short": _ShortTail(every=self.every), "long": _LongTail(every=self.every)}


@dataclass(frozen=True)
class _ShortTail(Uniform):
    """The average of ``TwoTailed`` that begins anew whenever it is at least as good as the other."""


@dataclass(frozen=True)
class _LongTail(Uniform):
    """The average of ``TwoTailed`` that becomes the short one whenever that is at least as good."""


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{name} must be a number > 0 and finite, got {value!r}")
    return float(value)


def _at_least_1(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _in_range(average: Average, name: str, low: float, high: float, expected: str) -> None:
    """Validates that an option is in (low, high]; stores it as a float, so that equal averages have equal ``repr``."""
    value = getattr(average, name)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not low < float(value) <= high or math.isinf(value):
        raise ValueError(f"{name} must be a number {expected}, got {value!r}")
    object.__setattr__(average, name, float(value))
