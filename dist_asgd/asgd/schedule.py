"""XXX docstring."""

from __future__ import annotations

import ctypes
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dist_asgd.averages.kinds import Average, Uniform

UNIFORM = Uniform()  # torch's average


# Options that torch.optim.ASGD does not have, and the values that say what it does.
OWN_OPTIONS = {"lr_on_time": False, "eta_decay": None}


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """The options of one param group that the rule reads."""

    lr: float | Tensor  # a tensor has one element; eta is then computed with tensor arithmetic, as torch does
    lambd: float
    alpha: float
    t0: float
    weight_decay: float
    maximize: bool
    capturable: bool = False  # a tensor lr is read on its device, when a step is computed
    lr_on_time: bool = False  # eta is that of the lr when the step begins
    eta_decay: float | None = None  # by how much eta falls from step to step; None: as lambd says
    restarted: bool = False  # averages begin at t0, not later

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Hyperparameters:
        needed = [name for name in cls.__slots__ if name not in (*OWN_OPTIONS, "restarted")]
        missing = [name for name in needed if name not in group]
        if missing:
            raise ValueError(f"the param_group has no {missing[0]}; every group needs {', '.join(needed)}")
        return cls(**{name: group[name] for name in cls.__slots__ if name in group})

    def __post_init__(self) -> None:
        """Raises ``ValueError`` (``TypeError`` for a non-number) that names the option, its value and its range."""
        lr = self.lr
        if isinstance(lr, Tensor):
            if lr.numel() != 1 or lr.is_meta:
                found = f"shape {tuple(lr.shape)} on {lr.device.type}"
                raise ValueError(f"lr must be a number or a tensor of 1 element that has a value, got {found}")
            lr = lr.item() if self.device_lr is None else 0.0
        _check_number("lr", lr, low=0.0)
        _check_number("lambd", self.lambd, low=0.0)
        _check_number("alpha", self.alpha, low=0.0)
        # t0 = inf is a way to say "never average", so infinity is welcome there and nowhere else.
        _check_number("t0", self.t0, low=0.0, finite=False)
        _check_number("weight_decay", self.weight_decay, low=0.0)
        if self.eta_decay is not None:
            _check_number("eta_decay", self.eta_decay, low=0.0)
        for name, value in (
            ("maximize", self.maximize),
            ("lr_on_time", self.lr_on_time),
            ("restarted", self.restarted),
        ):
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        if self.lr_on_time and self.capturable:
            raise ValueError(
                "lr_on_time=True with capturable=True: a CUDA graph computes eta at the end of a step, on the device. "
                "Leave out one of the two"
            )

    @property
    def decay(self) -> float:
        """Of ``eta``."""
        return self.lambd if self.eta_decay is None else self.eta_decay

    @property
    def device_lr(self) -> Tensor | None:
        """The ``lr`` where only the device is to read it: the host would have to wait for it."""
        on_device = self.capturable and isinstance(self.lr, Tensor) and self.lr.device.type != "cpu"
        return self.lr if on_device and isinstance(self.lr, Tensor) else None


@dataclass(frozen=True, slots=True)
class Scalars:
    """``step``: steps taken; ``eta`` and ``mu``: what the next one uses. Host numbers, so reading them never syncs."""

    step: int  # an int, since torch's fp32 counter stops at 2**24
    eta: float
    mu: float
    further: tuple[float, ...] = ()  # mu of the averages beside the first

    @property
    def mus(self) -> tuple[float, ...]:
        """Of all averages."""
        return self.mu, *self.further

    def read(self) -> Scalars:
        return self

    def apart(self) -> Scalars:
        return self


def own_options(*values: object) -> dict[str, object]:
    """What param groups, and so state dicts, say of OWN_OPTIONS: nothing of those by which torch's rule stays."""
    given = zip(OWN_OPTIONS.items(), values, strict=True)
    return {name: value for (name, torchs), value in given if value is not torchs}


def first_scalars(h: Hyperparameters) -> Scalars:
    """The state of a parameter before its first step: its ``eta`` is the ``lr`` that holds when that step comes."""
    return Scalars(step=0, eta=_round_scalar(float(h.lr)), mu=1.0)


def next_scalars(h: Hyperparameters, step: int, averages: Sequence[Average] = (UNIFORM,)) -> Scalars:
    """The state after ``step`` steps, in the double arithmetic and the rounding of torch."""
    mu, *further = (_round_scalar(float(average.mu(step, h.t0, h.restarted))) for average in averages)
    return Scalars(step, _eta(h, step), mu, tuple(further))


def current_scalars(h: Hyperparameters, scalars: Scalars) -> Scalars:
    """The state with which a step would begin now."""
    if not scalars.step:
        return replace(scalars, eta=first_scalars(h).eta)
    return replace(scalars, eta=_eta(h, scalars.step)) if h.lr_on_time else scalars


def _eta(h: Hyperparameters, step: int) -> float:
    """Of the step after ``step`` steps."""
    return _round_scalar(float(h.lr / ((1 + h.decay * h.lr * float(step)) ** h.alpha)))


@dataclass(frozen=True, slots=True, eq=False)
class Scaling:
    """What GradScaler knows of the gradients of a step, on their device: 1 element each, fp32."""

    inverse_scale: Tensor | None  # gradients are multiplied by it
    found_inf: Tensor  # there is no step unless it is 0

    def on(self, device: torch.device) -> Scaling:
        inverse_scale = None if self.inverse_scale is None else self.inverse_scale.to(device, non_blocking=True)
        return Scaling(inverse_scale, self.found_inf.to(device, non_blocking=True))


@dataclass(frozen=True, slots=True, eq=False)  # by identity: each advances by itself, and reading them would wait
class DeviceScalars:
    """``Scalars`` in the memory of a device, for steps that are captured in a CUDA graph: 1 element each.

    As long as ``step`` is 0, ``eta`` says nothing: that of the first step is the ``lr`` of its time.
    """

    step: Tensor  # int64
    eta: Tensor  # in the dtype to which ``Scalars`` are rounded
    mu: Tensor  # the same
    scaling: Scaling | None = None  # of the step that is being computed

    @classmethod
    def of(cls, scalars: Scalars, device: torch.device) -> DeviceScalars:
        dtype = scalar_dtype()
        eta, mu = (torch.tensor(value, dtype=dtype, device=device) for value in (scalars.eta, scalars.mu))
        return cls(torch.tensor(scalars.step, device=device), eta, mu)

    def read(self) -> Scalars:
        """Waits for the device."""
        return Scalars(int(self.step.item()), self.eta.item(), self.mu.item())

    def apart(self) -> DeviceScalars:
        """The same numbers, which advance by themselves from here on."""
        if is_captured(self.step.device):
            raise RuntimeError(
                "step() is being captured in a CUDA graph, and other parameters than in the last step have gradients: "
                "take such a step before the capture"
            )
        return DeviceScalars(self.step.clone(), self.eta.clone(), self.mu.clone())

    def scaled(self, scaling: Scaling | None) -> DeviceScalars:
        """For one step."""
        return self if scaling is None else replace(self, scaling=scaling.on(self.step.device))

    def set_(self, scalars: Scalars) -> None:
        self.step.fill_(scalars.step)
        self.eta.fill_(scalars.eta)
        self.mu.fill_(scalars.mu)


AnyScalars = Scalars | DeviceScalars


def is_captured(device: torch.device) -> bool:
    """Whether what is done on ``device`` goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _check_number(name: str, value: object, *, low: float, finite: bool = True) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):  # Real: numpy's too
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:  # an integer
        number = math.nan
    if math.isnan(number) or number < low or (finite and math.isinf(number)):
        raise ValueError(f"{name} must be a {'finite ' if finite else ''}number >= {low:g}, got {value!r}")


def scalar_dtype() -> torch.dtype:
    """In which torch.optim keeps ``eta`` and ``mu``: fp32, or fp64 where that is the default dtype."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def _round_scalar(value: float) -> float:
    return value if scalar_dtype() == torch.float64 else ctypes.c_float(value).value
