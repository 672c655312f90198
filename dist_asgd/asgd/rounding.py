"""Rounds the result of a step into the dtype of the parameter, to the nearest or stochastically."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from dist_asgd.asgd.schedule import AnyScalars, DeviceScalars

Number = TypeVar("Number", int, Tensor)


@dataclass(frozen=True, slots=True)
class Rounding:
    """How the values that a step computes become parameters. An instance is a function that rounds values.

    Attributes:
        dtype: real: the dtype of the parameters, or, with masters, a narrower one in which ranks send them.
        seed: None to round to the nearest. A number to round stochastically, to the value above or below with
            probabilities that make the mean of many roundings right; only for bf16 parameters without masters.
        first: the number of the first element. Elements of equal number and seed are rounded alike on every device.
    """

    dtype: torch.dtype
    seed: int | None = None
    first: int = 0

    def at(self, first: int, scalars: AnyScalars) -> Rounding:
        """Returns the rounding of one step for the elements from number ``first`` on.

        The seed of the step is ``scramble(seed + step)``. With ``DeviceScalars`` the kernel computes it, because only
        the device knows the step.
        """
        if self.seed is None:
            return self
        seed = self.seed if isinstance(scalars, DeviceScalars) else scramble(self.seed + scalars.step)
        return Rounding(self.dtype, seed, first)

    def __call__(self, values: Tensor) -> Tensor:
        """Returns ``values``, in compute_dtype, rounded to ``dtype``. They must be 1-D if there is a seed."""
        return values.to(self.dtype) if self.seed is None else round_stochastically(values, self.seed, self.first)


def scramble(number: Number) -> Number:
    """Returns 32 pseudo-random bits for an int or each element of an int64 tensor, as kernels/cpu.c and gpu.py do.

    It is the finalizer of MurmurHash3 (Appleby, 2011, public domain). The low 32 bits of an int64 product are right
    even if it overflows.
    """
    number = number & 0xFFFFFFFF
    number = ((number ^ number >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    number = ((number ^ number >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return number ^ number >> 16


def round_stochastically(values: Tensor, seed: int, first: int) -> Tensor:
    """Rounds 1-D fp32 ``values`` to bf16, upwards with the probability of the fraction that is cut off.

    Infinities and NaNs stay what they are.

    Args:
        seed: in [0, 2**32).
        first: the number of the first value; see ``Rounding.first``.
    """
    number = torch.arange(first, first + len(values), device=values.device)
    noise = scramble(number * 0x9E3779B1 ^ seed) & 0xFFFF
    cut = ((values.view(torch.int32) + noise.to(torch.int32)) & ~0xFFFF).view(torch.float32)
    return torch.where(values.isfinite(), cut, values).to(torch.bfloat16)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which the rule is computed for parameters of ``dtype``: the wider of it and fp32."""
    return torch.promote_types(dtype, torch.float32)


def current_master(master: Tensor, param: Tensor, rounding: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Returns ``master``, with ``param`` in place of every element whose rounding to ``rounding`` is not the parameter.

    There, somebody has written the parameter since the last step.

    Args:
        master: in compute_dtype.
        param: the parameter, of the shape of ``master``.
        out: where to write the result, which may be ``master``; None for a new tensor.
    """
    return torch.where(master.to(rounding) == param, master, param.to(master.dtype), out=out)
