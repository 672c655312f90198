"""XXX docstring."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_asgd.asgd.schedule import (
    AnyScalars,
    DeviceScalars,
)


@dataclass(frozen=True, slots=True)
class Rounding:
    """How parameters are made of what was computed.

    Attributes:
        dtype: real: the parameters' own, or a narrower one in which they travel, where there are masters.
        seed: None to round to the nearest; else to the value above or below by chance, so that the mean of many
            roundings is right (stochastic rounding). Of bf16 parameters without masters.
        first: number of the first element: equal numbers and seeds make equal choices, on whatever device.
    """

    dtype: torch.dtype
    seed: int | None = None
    first: int = 0

    def at(self, first: int, scalars: AnyScalars) -> Rounding:
        """For the elements from ``first`` on, in one step. Where a device knows the step, it scrambles the seed."""
        if self.seed is None:
            return self
        seed = self.seed if isinstance(scalars, DeviceScalars) else scramble(self.seed + scalars.step)
        return Rounding(self.dtype, seed, first)

    def __call__(self, values: Tensor) -> Tensor:
        """``values``, in compute_dtype, as they can be in ``dtype``."""
        return values.to(self.dtype) if self.seed is None else stochastically(values, self.seed, self.first)


def scramble(number: int) -> int:
    """32 bits that look random: the finalizer of MurmurHash3 (Appleby, 2011, public domain), as in kernels/cpu.c."""
    number &= 0xFFFFFFFF
    number = ((number ^ number >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    number = ((number ^ number >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return number ^ number >> 16


def stochastically(values: Tensor, seed: int, first: int) -> Tensor:
    """fp32 ``values``, 1-D, as bf16: up with the probability of the fraction that is cut off."""
    number = torch.arange(first, first + len(values), device=values.device)
    # The low 32 bits of a product are right whatever becomes of the others.
    number = (number * 0x9E3779B1 ^ seed) & 0xFFFFFFFF
    number = ((number ^ number >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    number = ((number ^ number >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    noise = (number ^ number >> 16) & 0xFFFF
    cut = ((values.view(torch.int32) + noise.to(torch.int32)) & ~0xFFFF).view(torch.float32)
    return torch.where(values.isfinite(), cut, values).to(torch.bfloat16)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the rule is computed: the parameter's, but at least fp32 precision."""
    return torch.promote_types(dtype, torch.float32)


def followed(master: Tensor, param: Tensor, rounding: torch.dtype, out: Tensor | None = None) -> Tensor:
    """``master``, but ``param`` where that no longer is its ``rounding``."""
    return torch.where(master.to(rounding) == param, master, param.to(master.dtype), out=out)
