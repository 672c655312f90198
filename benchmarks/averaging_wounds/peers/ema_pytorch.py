"""``ema_pytorch.EMA``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import ClassVar

from ema_pytorch import EMA
from torch import nn

from benchmarks.averaging_wounds.peer import MADE_FIRST, MADE_LAST, MEAN, CopiedModel

ALMOST_ALWAYS = 0.999999  # beta, which 1 would freeze: the mean up to a million iterates


class EmaPytorch(CopiedModel):
    """``EMA``. Of a sharded model it is given one that is sharded alike (``ema_model=``), as it cannot copy that."""

    PLAIN, COERCED = "as the model is", "ema_model= in fp32, coerce_dtype=True"
    CALLED, HOOKED = "update() after each step", "add_to_optimizer_post_step_hook()"
    ways: ClassVar[Mapping[int, tuple[str, ...]]] = {
        2: (PLAIN, COERCED),
        5: (MADE_LAST, MADE_FIRST),
        12: (CALLED, HOOKED),
    }

    def copied(self, decay: float) -> nn.Module:
        wish, given = self.wish, None
        if self.training.layout == "fsdp":
            given = self.training.place(self.training.make())
        if wish.way == self.COERCED:
            given = copy.deepcopy(self.model).float()
        schedule = {"beta": decay} if wish.warmup else {"beta": decay, "min_value": decay}
        if decay == MEAN:
            schedule = {"beta": ALMOST_ALWAYS, "inv_gamma": 1.0, "power": 1.0}
        ema = EMA(
            self.model,
            ema_model=given,
            update_after_step=wish.start,
            update_every=1,
            include_online_model=False,
            allow_different_devices=wish.offload,
            coerce_dtype=wish.way == self.COERCED,
            **schedule,
        )
        if wish.way == self.HOOKED:
            ema.add_to_optimizer_post_step_hook(self.optimizer)
        return ema

    @staticmethod
    def module_of(copy: nn.Module) -> nn.Module:
        return copy.ema_model

    def update(self) -> None:
        if self.wish.way != self.HOOKED:
            for ema in self.copies:
                ema.update()


KIND = EmaPytorch
