"""``torch.optim.swa_utils.AveragedModel``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from benchmarks.averaging_wounds.peer import MADE_FIRST, MADE_LAST, MEAN, CopiedModel
from benchmarks.averaging_wounds.training import Values, batch


class TorchAveragedModel(CopiedModel):
    """``AveragedModel``, updated after each step from the start on."""

    WITH_UPDATE_BN = "update_bn"
    GATHERED = "made before, saved whole by get_model_state_dict(full_state_dict=True)"
    ways: ClassVar[Mapping[int, tuple[str, ...]]] = {
        **CopiedModel.ways,
        6: (MADE_LAST, MADE_FIRST, GATHERED),
        11: ("use_buffers=True", WITH_UPDATE_BN),
    }
    first: ClassVar[tuple[str, ...]] = (MADE_FIRST, GATHERED)

    def copied(self, decay: float) -> nn.Module:
        multi_avg_fn = None if decay == MEAN else get_ema_multi_avg_fn(decay)
        device = "cpu" if self.wish.offload else None
        use_buffers = self.wish.buffers and self.wish.way != self.WITH_UPDATE_BN
        return AveragedModel(self.model, device=device, multi_avg_fn=multi_avg_fn, use_buffers=use_buffers)

    @staticmethod
    def module_of(copy: nn.Module) -> nn.Module:
        return copy.module

    def update(self) -> None:
        if self.steps > self.wish.start:
            for copy in self.copies:
                copy.update_parameters(self.model)

    def average(self, number: int = 0) -> Values:
        if self.wish.way == self.WITH_UPDATE_BN:
            self.recomputed = True
            update_bn((batch(step, 7)[0] for step in range(self.steps)), self.copies[number])
        return super().average(number)

    def save_averages(self, folder: Path) -> None:
        if self.wish.way != self.GATHERED:
            super().save_averages(folder)
            return
        state = get_model_state_dict(self.module_of(self.copies[0]), options=StateDictOptions(full_state_dict=True))
        if dist.get_rank() == 0:
            torch.save(state, folder.with_suffix(".pt"))


KIND = TorchAveragedModel
