"""The dtypes in which parameters, averages and masters are kept and sent."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_asgd.asgd.rounding import Rounding, compute_dtype


@dataclass(frozen=True, slots=True)
class Precision:
    """Options of the optimizer that choose dtypes and rounding, and the dtypes that follow for a parameter's dtype."""

    master_weights: bool
    average_dtype: torch.dtype | None  # None: fp32 or the dtype of the parameter, whichever is wider
    wire_dtype: torch.dtype | None  # None: the dtype of the parameter
    stochastic_rounding: bool
    capturable: bool  # step, eta and mu are tensors on the device

    def needs_master(self, dtype: torch.dtype, rounded: torch.dtype) -> bool:
        """Whether parameters of ``dtype`` that a step rounds to ``rounded`` need a master copy that is not rounded."""
        return self.master_weights and compute_dtype(dtype.to_real()) != rounded

    def gradient_wire(self, dtype: torch.dtype) -> torch.dtype:
        """Returns the dtype in which ranks send gradients of parameters of ``dtype``."""
        return dtype if self.wire_dtype is None or dtype.is_complex else self.wire_dtype

    def wire(self, dtype: torch.dtype) -> torch.dtype:
        """Returns the dtype in which ranks send parameters of ``dtype`` after a step: never a wider one."""
        wire = self.gradient_wire(dtype)
        return wire if wire.itemsize < dtype.itemsize else dtype

    def rounding(self, dtype: torch.dtype, travels: bool, seed: int) -> Rounding:
        """Returns how a step rounds parameters of ``dtype``; ``travels`` says whether they are sent to other ranks."""
        by_chance = self.stochastic_rounding and dtype == torch.bfloat16
        return Rounding((self.wire(dtype) if travels else dtype).to_real(), seed if by_chance else None)

    def average(self, dtype: torch.dtype) -> torch.dtype:
        """Returns the dtype of the averages of parameters of ``dtype``."""
        if self.average_dtype is None:
            return compute_dtype(dtype)
        return torch.promote_types(self.average_dtype, torch.complex32) if dtype.is_complex else self.average_dtype
