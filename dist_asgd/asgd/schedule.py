"""The options of a param group, and the ``step``, ``eta`` and ``mu`` of a parameter from one step to the next."""

from __future__ import annotations

import ctypes
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from dist_asgd.averages.kinds import Average, Uniform

UNIFORM = Uniform()  # the average of torch.optim.ASGD


# Options that torch.optim.ASGD does not have, with the values that give its behaviour.
OWN_OPTIONS = {"lr_on_time": False, "eta_decay": None}


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """The options of one param group that the rule reads.

    Raises:
        ValueError, TypeError: an option has a bad value; the message has its name, its value and its range.
    """

    lr: float | Tensor  # a tensor has 1 element; eta is then computed with tensor arithmetic, as torch does
    lambd: float
    alpha: float
    t0: float
    weight_decay: float
    maximize: bool
    capturable: bool = False  # a tensor lr is read on its device, when the step is computed there
    lr_on_time: bool = False  # eta is computed from the lr when the step begins, not at the end of the step before
    eta_decay: float | None = None  # takes the place of lambd in the formula of eta; None: lambd
    restarted: bool = False  # every average starts at t0, even a kind that would start later
    _etas: dict[int, float] = field(default_factory=dict, init=False, repr=False, compare=False)  # what eta() returned
    _following: dict[Any, Scalars] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Hyperparameters:
        """Reads the options of a param group. Raises ``ValueError`` also if one that torch has is missing."""
        needed = [name for name in OPTIONS if name not in (*OWN_OPTIONS, "restarted")]
        missing = [name for name in needed if name not in group]
        if missing:
            raise ValueError(f"the param_group has no {missing[0]}; every group needs {', '.join(needed)}")
        return cls(**{name: group[name] for name in OPTIONS if name in group})

    def __post_init__(self) -> None:
        lr = self.lr
        if isinstance(lr, Tensor):
            if lr.numel() != 1 or lr.is_meta:
                found = f"shape {tuple(lr.shape)} on {lr.device.type}"
                raise ValueError(f"lr must be a number or a tensor of 1 element that has a value, got {found}")
            lr = lr.item() if self.device_lr is None else 0.0
        _check_number("lr", lr)
        if self.device_lr is None:
            self._etas[0] = float(lr)
        _check_number("lambd", self.lambd)
        _check_number("alpha", self.alpha)
        # t0 = inf means "never average"; no other option may be infinite.
        _check_number("t0", self.t0, finite=False)
        _check_number("weight_decay", self.weight_decay)
        if self.eta_decay is not None:
            _check_number("eta_decay", self.eta_decay)
        for name in ("maximize", "lr_on_time", "restarted"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.lr_on_time and self.capturable:
            raise ValueError(
                "lr_on_time=True with capturable=True: a CUDA graph computes eta at the end of a step, on the device. "
                "Leave out one of the two"
            )

    @property
    def decay(self) -> float:
        """The factor of ``lr * step`` in the formula of ``eta``."""
        return self.lambd if self.eta_decay is None else self.eta_decay

    @property
    def device_lr(self) -> Tensor | None:
        """The ``lr`` if it is a tensor that the host must not read, because it would wait for the device; else None."""
        on_device = self.capturable and isinstance(self.lr, Tensor) and self.lr.device.type != "cpu"
        return self.lr if on_device and isinstance(self.lr, Tensor) else None

    def eta(self, step: int) -> float:
        """Returns ``eta`` of the step that follows ``step`` steps, before it is rounded; with 0, that is the ``lr``.

        The result is kept, because an ``lr`` on a device makes the host wait for each number that it reads.
        """
        if step not in self._etas:
            self._etas[step] = float(self.lr / ((1 + self.decay * self.lr * float(step)) ** self.alpha))
        return self._etas[step]


OPTIONS = tuple(option.name for option in fields(Hyperparameters) if option.init)


@dataclass(frozen=True, slots=True)
class Scalars:
    """The ``step``, ``eta`` and ``mus`` of a parameter as host numbers, which can be read without waiting for a device.

    Attributes:
        step: the number of steps taken. An int, because torch's fp32 counter stops at 2**24.
        eta: the step size of the next step.
        mus: for each average, the fraction by which the next step moves it.
    """

    step: int
    eta: float
    mus: tuple[float, ...]

    def read(self) -> Scalars:
        """Returns itself; ``DeviceScalars.read`` waits for the device."""
        return self

    def copy(self) -> Scalars:
        """Returns itself, since it is immutable; ``DeviceScalars.copy`` copies tensors."""
        return self


def own_options(*values: object) -> dict[str, object]:
    """Returns the entries of a param group for ``OWN_OPTIONS``, without those that have the value of torch's behaviour.

    Args:
        values: one for each of ``OWN_OPTIONS``, in that order.
    """
    given = zip(OWN_OPTIONS.items(), values, strict=True)
    return {name: value for (name, torchs), value in given if value is not torchs}


def first_scalars(h: Hyperparameters) -> Scalars:
    """Returns the scalars of a parameter before its first step, whose ``eta`` is the ``lr``."""
    return Scalars(step=0, eta=_round_scalar(h.eta(0)), mus=(1.0,))


def next_scalars(h: Hyperparameters, step: int, averages: Sequence[Average] = (UNIFORM,)) -> Scalars:
    """Returns the scalars after ``step`` steps, computed in double and rounded as torch does.

    ``h`` keeps the result, so that all buckets of a param group have one object of it.
    """
    key = (step, *averages)
    known = h._following.get(key)
    if known is None:
        mus = tuple(_round_scalar(float(average.mu(step, h.t0, h.restarted))) for average in averages)
        known = h._following[key] = Scalars(step, _round_scalar(h.eta(step)), mus)
    return known


def current_scalars(h: Hyperparameters, scalars: Scalars) -> Scalars:
    """Returns ``scalars`` as a step that begins now uses them: ``lr`` may have changed since the last step."""
    if not scalars.step:
        return replace(scalars, eta=first_scalars(h).eta)
    return replace(scalars, eta=_round_scalar(h.eta(scalars.step))) if h.lr_on_time else scalars


@dataclass(frozen=True, slots=True, eq=False)
class Scaling:
    """The state of a GradScaler for the gradients of one step."""

    inverse_scale: Tensor | None  # 1 element, fp32: the step multiplies gradients by it; None if they are unscaled
    found_inf: Tensor  # 1 element, fp32: the step is skipped unless it is 0

    def on(self, device: torch.device) -> Scaling:
        """Returns a copy on ``device``, without waiting for it."""
        inverse_scale = None if self.inverse_scale is None else self.inverse_scale.to(device, non_blocking=True)
        return Scaling(inverse_scale, self.found_inf.to(device, non_blocking=True))


@dataclass(frozen=True, slots=True, eq=False)  # compared by identity, since comparing values would wait for the device
class DeviceScalars:
    """``Scalars`` of one average in the memory of a device, for steps that a CUDA graph captures.

    While ``step`` is 0, ``eta`` has no meaning: the first step uses the ``lr`` of its time.
    """

    step: Tensor  # 0-D, int64
    eta: Tensor  # 0-D, scalar_dtype()
    mu: Tensor  # 0-D, scalar_dtype()
    scaling: Scaling | None = None  # GradScaler's, during a step

    @classmethod
    def of(cls, scalars: Scalars, device: torch.device) -> DeviceScalars:
        """Copies ``scalars``, which must have one ``mu``, to ``device``."""
        dtype = scalar_dtype()
        eta, mu = (torch.tensor(value, dtype=dtype, device=device) for value in (scalars.eta, *scalars.mus))
        return cls(torch.tensor(scalars.step, device=device), eta, mu)

    def read(self) -> Scalars:
        """Returns the numbers on the host, which waits for the device."""
        return Scalars(int(self.step.item()), self.eta.item(), (self.mu.item(),))

    def copy(self) -> DeviceScalars:
        """Returns a copy that advances separately. Raises ``RuntimeError`` while a CUDA graph is being captured."""
        if is_captured(self.step.device):
            raise RuntimeError(
                "step() is being captured in a CUDA graph, and other parameters than in the last step have gradients: "
                "take such a step before the capture"
            )
        return DeviceScalars(self.step.clone(), self.eta.clone(), self.mu.clone())

    def scaled(self, scaling: Scaling | None) -> DeviceScalars:
        """Returns these scalars, sharing their tensors, with the ``scaling`` of one step."""
        return self if scaling is None else replace(self, scaling=scaling.on(self.step.device))

    def set_(self, scalars: Scalars) -> None:
        """Overwrites the tensors with ``scalars``."""
        self.step.fill_(scalars.step)
        self.eta.fill_(scalars.eta)
        self.mu.fill_(*scalars.mus)


AnyScalars = Scalars | DeviceScalars


def is_captured(device: torch.device) -> bool:
    """Returns whether a CUDA graph is capturing the work on ``device``."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _check_number(name: str, value: object, *, finite: bool = True) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):  # Real includes NumPy's numbers
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the range of float
        number = math.nan
    if math.isnan(number) or number < 0 or (finite and math.isinf(number)):
        raise ValueError(f"{name} must be a {'finite ' if finite else ''}number >= 0, got {value!r}")


def scalar_dtype() -> torch.dtype:
    """Returns the dtype in which torch.optim keeps ``eta`` and ``mu``: fp32, or fp64 if that is the default dtype."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def _round_scalar(value: float) -> float:
    return value if scalar_dtype() == torch.float64 else ctypes.c_float(value).value
