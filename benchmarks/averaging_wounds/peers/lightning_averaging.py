"""Lightning's ``WeightAveraging`` callback."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.averaging_wounds.peer import MEAN, NotPossible, Peer
from benchmarks.averaging_wounds.training import Values, values

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class StartsLate(WeightAveraging):
    """The mean of the weights after each step from a start on, by the hook that Lightning documents for it."""

    def __init__(self, start: int, **options: Any) -> None:
        super().__init__(**options)
        self.start = start

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and step_idx >= self.start


class Module(LightningModule):
    """The training as Lightning wants it."""

    def __init__(self, peer: Lightning) -> None:
        super().__init__()
        self.net, self.peer = peer.model, peer

    def training_step(self, step: Tensor, index: int) -> Tensor:
        return self.peer.training.loss_at(self.net, self.peer.steps)

    def validation_step(self, step: Tensor, index: int) -> None:
        self.peer.validated(self.net)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.peer.training.optimizer(self.net.parameters())


class Follows(Callback):
    """Stores iterates, and pauses the training after the averages have been updated."""

    def __init__(self, peer: Lightning) -> None:
        self.peer = peer

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.peer.took_batch()


class Lightning(Peer):
    """A ``Trainer`` with the callback, or one for each average; under DDP, as it does not average sharded models."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Lightning:
        """Returns this object: the copy of the module that is the average belongs to it as well."""
        return self

    def keep(self) -> None:
        """Builds nothing: the callback makes its average when the training begins."""

    def begin(self) -> None:
        if self.training.layout == "fsdp":
            raise NotPossible("its documentation: sharded models do not work with weight averaging")
        if self.wish.offload:
            raise NotPossible("sharded models do not work with weight averaging")
        self.module = Module(self)
        self.callbacks = [self._callback(decay) for decay in self.wish.decays]
        self.objects = len(self.callbacks)
        self.checkpoint: Path | None = None
        self.pauses: Mapping[int, Callable[[], None]] = {}
        self.evaluations: Mapping[int, Callable[[nn.Module], None]] = {}

    def _callback(self, decay: float) -> WeightAveraging:
        use_buffers = self.wish.buffers
        if decay == MEAN:
            return StartsLate(self.wish.start, use_buffers=use_buffers)
        return EMAWeightAveraging(use_buffers=use_buffers, decay=decay, update_starting_at_step=self.wish.start)

    def train(
        self,
        steps: int,
        pauses: Mapping[int, Callable[[], None]] | None = None,
        evaluations: Mapping[int, Callable[[nn.Module], None]] | None = None,
    ) -> None:
        self.pauses, self.evaluations = pauses or {}, evaluations or {}
        total = self.steps + steps
        precision = []
        if self.training.overflows is not None:
            scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
            precision = [MixedPrecision("16-mixed", device="cpu", scaler=scaler)]
        self.trainer = Trainer(
            accelerator="cpu",
            devices=torch.distributed.get_world_size(),
            strategy="ddp",
            plugins=[TorchElasticEnvironment(), *precision],
            callbacks=[*self.callbacks, Follows(self)],
            max_steps=total,
            max_epochs=-1,
            val_check_interval=1 if self.evaluations else None,
            limit_val_batches=1 if self.evaluations else 0,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        module = torch.compile(self.module, backend="eager") if self.training.is_compiled else self.module
        loader = DataLoader(range(4096))
        self.trainer.fit(module, loader, loader, ckpt_path=self.checkpoint, weights_only=False)

    def took_batch(self) -> None:
        """Counts a step, stores its iterate, and pauses."""
        skipped = self.steps in (self.training.overflows or ())
        self.steps += 1
        self.took_step(skipped)
        if self.steps in self.pauses:
            self.pauses[self.steps]()

    def validated(self, model: nn.Module) -> None:
        """Called in Lightning's validation, which runs on the average."""
        if self.steps in self.evaluations:
            self.evaluations[self.steps](model)

    def average(self, number: int = 0) -> Values:
        return values(self.callbacks[number]._average_model.module.net)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Does nothing: ``fit`` loads the checkpoint."""

    def save(self, folder: Path) -> None:
        self.trainer.save_checkpoint(folder)

    def load(self, folder: Path) -> None:
        """Reads the count of steps; the average is there when the training goes on."""
        self.checkpoint = folder
        self.steps = torch.load(folder, weights_only=False)["global_step"]


KIND = Lightning
