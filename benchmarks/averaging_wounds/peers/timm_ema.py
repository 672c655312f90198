"""``timm.utils.ModelEmaV3``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from timm.utils import ModelEmaV3
from torch import nn

from benchmarks.averaging_wounds.peer import MEAN, CopiedModel


class Timm(CopiedModel):
    """``ModelEmaV3``, updated after each step with the count of steps, as timm's own training script does."""

    STOCHASTIC, IN_FP32 = "stochastic rounding, its default", "dtype=torch.float32"
    ways: ClassVar[Mapping[int, tuple[str, ...]]] = {**CopiedModel.ways, 2: (STOCHASTIC, IN_FP32)}

    def copied(self, decay: float) -> nn.Module:
        schedule: dict[str, Any] = {"decay": decay, "use_warmup": self.wish.warmup}
        if decay == MEAN:
            schedule |= {"use_warmup": True, "warmup_gamma": 1.0, "warmup_power": 1.0}
        dtype = torch.float32 if self.wish.way == self.IN_FP32 else None
        device = "cpu" if self.wish.offload else None
        return ModelEmaV3(self.model, update_after_step=self.wish.start, device=device, dtype=dtype, **schedule)

    @staticmethod
    def module_of(copy: nn.Module) -> nn.Module:
        return copy.module

    def update(self) -> None:
        for ema in self.copies:
            ema.update(self.model, step=self.steps)


KIND = Timm
