"""``dist_asgd.ShardedAverages``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

import dist_asgd
from benchmarks.averaging_wounds.peer import MEAN, Peer
from benchmarks.averaging_wounds.training import Values, plain_name, whole
from dist_asgd import EMA, ShardedAverages, Uniform


class Ours(Peer):
    """``ShardedAverages`` with the optimizer, which it follows, and ``dist_asgd.save`` and ``load``."""

    def keep(self) -> None:
        wish = self.wish
        kinds = {
            f"average{number}": Uniform() if decay == MEAN else EMA(decay, warmup=wish.warmup)
            for number, decay in enumerate(wish.decays)
        }
        self.averages = ShardedAverages(
            self.model.named_parameters(),
            kinds,
            optimizer=self.optimizer,
            start=wish.start,
            buffers="average" if wish.buffers else None,
            offload=wish.offload,
            module=self.model,
        )

    def average(self, number: int = 0) -> Values:
        full: list[Any] = [self.averages.full_state_dict(f"average{number}")]
        dist.broadcast_object_list(full)
        return {plain_name(name): whole(tensor) for name, tensor in full[0].items()}

    @contextlib.contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        with self.averages.averaged_parameters():
            yield self.model

    def state(self) -> dict[str, Any]:
        return self.averages.state_dict()

    def restore(self, state: dict[str, Any]) -> None:
        self.averages.load_state_dict(state)

    def save(self, folder: Path) -> None:
        dist_asgd.save(str(folder), {"model": self.model, "averages": self.averages, "progress": {"steps": self.steps}})

    def save_averages(self, folder: Path) -> None:
        dist_asgd.save(str(folder), {"averages": self.averages})

    def load(self, folder: Path) -> None:
        progress = {"steps": 0}
        dist_asgd.load(str(folder), {"model": self.model, "averages": self.averages, "progress": progress})
        self.steps = progress["steps"]


KIND = Ours
