"""``diffusers.training_utils.EMAModel``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from benchmarks.averaging_wounds.peer import MEAN, NotPossible, Peer
from benchmarks.averaging_wounds.training import Values, plain_name, whole


class Diffusers(Peer):
    """``EMAModel``; ``store``, ``copy_to`` and ``restore`` around an evaluation, as the scripts of diffusers do."""

    PLAIN, IN_FP32 = "as the model is", "to(dtype=torch.float32)"
    ways: ClassVar[Mapping[int, tuple[str, ...]]] = {2: (PLAIN, IN_FP32)}

    def keep(self) -> None:
        if self.wish.buffers:
            raise NotPossible("EMAModel takes parameters only")
        self.emas = [self._ema(decay) for decay in self.wish.decays]
        self.objects = len(self.emas)
        for ema in self.emas:
            if self.wish.way == self.IN_FP32:
                ema.to(dtype=torch.float32)
            if self.wish.offload:
                ema.pin_memory()

    def _ema(self, decay: float) -> EMAModel:
        schedule: dict[str, Any] = {"decay": decay, "min_decay": 0.0 if self.wish.warmup else decay}
        if decay == MEAN:
            schedule = {"decay": 1.0, "use_ema_warmup": True, "inv_gamma": 1.0, "power": 1.0}
        return EMAModel(self.model.parameters(), update_after_step=self.wish.start, **schedule)

    def update(self) -> None:
        for ema in self.emas:
            ema.step(self.model.parameters())

    def average(self, number: int = 0) -> Values:
        names = [plain_name(name) for name, _ in self.model.named_parameters()]
        return dict(zip(names, map(whole, self.emas[number].shadow_params), strict=True))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        ema = self.emas[0]
        ema.store(self.model.parameters())
        ema.copy_to(self.model.parameters())
        yield self.model
        ema.restore(self.model.parameters())

    def state(self) -> dict[str, Any]:
        return {str(number): ema.state_dict() for number, ema in enumerate(self.emas)}

    def restore(self, state: dict[str, Any]) -> None:
        for number, ema in enumerate(self.emas):
            ema.load_state_dict(state[str(number)])


KIND = Diffusers
