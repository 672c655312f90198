"""In which dtype parameters, averages and masters are kept and sent."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_asgd.asgd.rounding import Rounding, compute_dtype


@dataclass(frozen=True, slots=True)
class Precision:
    """What is kept and sent in which dtype, and where; the options of the optimizer."""

    master_weights: bool
    average_dtype: torch.dtype | None  # None: fp32 or the parameter's, whichever is wider
    wire_dtype: torch.dtype | None
    stochastic_rounding: bool
    capturable: bool  # step, eta and mu are kept on the device

    def needs_master(self, dtype: torch.dtype, rounded: torch.dtype) -> bool:
        return self.master_weights and compute_dtype(dtype.to_real()) != rounded

    def gradient_wire(self, dtype: torch.dtype) -> torch.dtype:
        """In which gradients of parameters of ``dtype`` travel."""
        return dtype if self.wire_dtype is None or dtype.is_complex else self.wire_dtype

    def wire(self, dtype: torch.dtype) -> torch.dtype:
        """In which the parameters travel."""
        wire = self.gradient_wire(dtype)
        return wire if wire.itemsize < dtype.itemsize else dtype

    def rounding(self, dtype: torch.dtype, travels: bool, seed: int) -> Rounding:
        """Of parameters of ``dtype`` that are sent to other ranks, or are not."""
        by_chance = self.stochastic_rounding and dtype == torch.bfloat16
        return Rounding((self.wire(dtype) if travels else dtype).to_real(), seed if by_chance else None)

    def average(self, dtype: torch.dtype) -> torch.dtype:
        if self.average_dtype is None:
            return compute_dtype(dtype)
        return torch.promote_types(self.average_dtype, torch.complex32) if dtype.is_complex else self.average_dtype
