"""The rule of torchtitan's ``components/ema.py``, written anew.

torchtitan 0.3.0, the newest release, does not contain that file, which is on its main branch (August 2026). So this is
our own plain copy of its rule: a state beside each parameter in the parameter's dtype and placement, which begins with
the parameter at construction; ``foreach_lerp`` by a fixed decay from a hook after the optimizer's step; a start counted
in steps of the trainer; saved by names without wrappers' parts. Its CPU offload copies by a stream of CUDA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.averaging_wounds.peer import MEAN, NotPossible, NotRun, Peer
from benchmarks.averaging_wounds.training import Values, plain_name, whole


class Torchtitan(Peer):
    """The container's rule, stepped by a hook of the optimizer with the step of the trainer."""

    has_mean = False
    holds_initial = True

    def keep(self) -> None:
        if self.wish.offload:
            raise NotRun("its offload needs a stream of CUDA")
        if self.wish.buffers:
            raise NotPossible("the container takes parameters only")
        if MEAN in self.wish.decays:
            raise NotPossible("an EMA only")
        if len(self.wish.decays) > 1:
            raise NotPossible("the trainer has one container")
        self.held: dict[str, Tensor] = {
            plain_name(name): param.detach().clone() for name, param in self.model.named_parameters()
        }
        self.optimizer.register_step_post_hook(self._follow)

    @torch.no_grad()
    def _follow(self, *_: Any) -> None:
        step = self.steps + 1  # the trainer counts before its step
        if step > self.wish.start:
            torch._foreach_lerp_(list(self.held.values()), list(self.model.parameters()), 1 - self.wish.decays[0])

    def average(self, number: int = 0) -> Values:
        return {name: whole(tensor) for name, tensor in self.held.items()}

    def state(self) -> dict[str, Any]:
        return {f"state.{name}.ema_params": tensor for name, tensor in self.held.items()}

    def restore(self, state: dict[str, Any]) -> None:
        for name, tensor in self.held.items():
            tensor.copy_(state[f"state.{name}.ema_params"])


KIND = Torchtitan
