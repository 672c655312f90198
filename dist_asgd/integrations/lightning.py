"""``AveragedWeights``: a callback by which Lightning's Trainer validates, saves and resumes averages of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor

from dist_asgd import ShardedASGD, ShardedAverages
from dist_asgd.averages.kinds import Average

KEY = "dist_asgd"  # of a checkpoint: the weights and averages to go on from


class AveragedWeights(Callback):
    """Validates on an average of the weights, saves it as the weights of checkpoints, and resumes the training.

    Stands in the place of Lightning's ``WeightAveraging``, with averages that are fp32, sharded over the ranks, and
    resumed by any number of devices::

        trainer = Trainer(callbacks=[AveragedWeights(EMA(0.999)), ModelCheckpoint(monitor="val_loss")])

    - Validation during ``fit`` runs on the average, so that whatever watches its metrics (``ModelCheckpoint``,
      ``EarlyStopping``) judges the average.
    - A checkpoint has the average under ``state_dict``, where ``load_from_checkpoint`` and ``test(ckpt_path=...)``
      look, and the weights and all averages beside it, from which ``fit(ckpt_path=...)`` goes on with this callback.
    - After ``fit`` the model holds the average.

    With DDP and on one device, rank 0 saves, and gathers the averages in the memory of its host. With
    ``ModelParallelStrategy`` and its distributed checkpoints, each rank saves its shards.

    Args:
        average: the kind of average, or a mapping of names to kinds, which ``ShardedAverages`` keeps beside the
            optimizers. None for optimizers that are ``ShardedASGD``, which keep averages by themselves.
        name: the average to validate with and to save as weights; None for the first.
        options: further options of ``ShardedAverages``, such as ``start=1000``. ``buffers`` is ``"average"`` unless
            given, as in ``WeightAveraging``.

    Attributes:
        averages: the ``ShardedAverages``, from the start of ``fit`` on; None with ``ShardedASGD``.

    Raises:
        TypeError, ValueError: by ``fit``, on every rank: the strategy is not one of these, ``average`` does not go with
            the optimizers, another callback averages weights, or a ``ModelCheckpoint`` has ``save_weights_only=True``,
            by which it would save other weights than those that were validated.
        RuntimeError: by ``save_checkpoint`` in the process that has started others (``ddp_spawn``) for ``fit``.
    """

    def __init__(
        self, average: Average | Mapping[str, Average] | None = None, *, name: str | None = None, **options: Any
    ) -> None:
        if average is None and options:
            raise TypeError(
                f"AveragedWeights has the options {sorted(options)}, which are for averages beside an optimizer, and "
                "no average=: pass average=, or give the options to ShardedASGD"
            )
        self.average, self.name, self.options = average, name, options
        self._forget()

    def _forget(self) -> None:
        self.averages: ShardedAverages | None = None
        self._optimizers: list[ShardedASGD] = []  # that keep averages by themselves
        self._swap: contextlib.ExitStack | None = None  # open during a validation
        self._is_interrupted = False  # whether a checkpoint is being taken during a validation
        self._to_load: dict[str, Any] | None = None  # from a checkpoint that was read before there were averages
        self._at_end: tuple[dict[str, Any], list[Any]] | None = None  # when the training ended; states of ShardedASGD

    # Begin and resume ------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks, before a training, what the trainer would do to averages."""
        if stage != TrainerFn.FITTING:
            return
        self._forget()
        strategy = trainer.strategy
        known = isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy)
        if not known or isinstance(strategy, DeepSpeedStrategy):
            raise TypeError(
                "AveragedWeights works on one device, with DDP and with ModelParallelStrategy, not with "
                f"{type(strategy).__name__}: choose one of these (fully_shard in configure_model takes FSDP's place)"
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
                other = type(callback).__name__
                raise ValueError(f"AveragedWeights and {other} would each put an average into the model: choose one")
            if isinstance(callback, ModelCheckpoint) and callback.save_weights_only:
                raise ValueError(
                    "ModelCheckpoint(save_weights_only=True) would save the weights, and not the average that is "
                    "validated, because Lightning tells no callback of it. Leave it out: load_from_checkpoint() finds "
                    "the average in a whole checkpoint, too"
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Builds the averages, when the model and its optimizers are as they are trained."""
        own = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, ShardedASGD)]
        if self.average is None:
            if not own or len(own) < len(trainer.optimizers):
                kinds = [type(optimizer).__name__ for optimizer in trainer.optimizers]
                raise TypeError(f"AveragedWeights() without average= needs ShardedASGD as optimizer, found {kinds}")
            self._optimizers = own
        else:
            options = {"buffers": "average", **self.options}
            self.averages = ShardedAverages(
                pl_module.named_parameters(), self.average, optimizer=trainer.optimizers, module=pl_module, **options
            )
        if self._to_load is not None:
            self._load(trainer, pl_module, self._to_load)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes the weights and averages of a checkpoint, from which a training goes on."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if KEY not in checkpoint:
            rank_zero_warn(
                "the checkpoint was saved without AveragedWeights: its weights are taken, and averages begin anew"
            )
        elif self.averages is not None or self._optimizers:
            self._load(trainer, pl_module, checkpoint[KEY])
        else:
            self._to_load = checkpoint[KEY]

    def _load(self, trainer: Trainer, pl_module: LightningModule, saved: dict[str, Any]) -> None:
        self._to_load, shards = None, saved.get("shards")
        if shards is not None:
            saved = self._entries(get_model_state_dict(pl_module))
            dcp.load({shards: saved}, checkpoint_id=trainer.ckpt_path)
        options = StateDictOptions(full_state_dict=shards is None, strict=pl_module.strict_loading)
        set_model_state_dict(pl_module, saved["weights"], options=options)
        if self.averages is not None:
            if "averages" not in saved:
                raise ValueError(
                    "the checkpoint has no averages beside the optimizer, since it was saved with the averages of "
                    "ShardedASGD: go on with AveragedWeights() without average="
                )
            self.averages.load_state_dict(saved["averages"])

    # Validate --------------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the average into the model, if this validation is part of a training."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._enter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the weights back. Lightning calls this before it lets ``ModelCheckpoint`` save."""
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Puts the weights back where an error or an interrupt has ended a validation."""
        self._leave()

    def _enter(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._averaged())
            self._swap = stack.pop_all()

    def _leave(self) -> None:
        swap, self._swap = self._swap, None
        if swap is not None:
            swap.close()

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside the block, the model holds the average. Collective."""
        holders = self._optimizers if self.averages is None else [self.averages]
        with contextlib.ExitStack() as stack:
            for holder in holders:
                stack.enter_context(holder.averaged_parameters(self.name))
            yield

    # Save ------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns what lets Lightning warn where a training is resumed without this callback. Collective.

        Lightning calls this when it begins a checkpoint. The average of a validation leaves the model here, so that the
        states of optimizers, which Lightning takes next, are those of the training; ``on_save_checkpoint`` brings it
        back. A job that Slurm ends during a validation is saved so.
        """
        self._is_interrupted = self._swap is not None
        self._leave()
        return {"average": repr(self.average), "name": self.name}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Makes the average the weights of the checkpoint, and adds what a training goes on from. Collective."""
        if self.averages is None and not self._optimizers:
            if trainer.state.fn == TrainerFn.FITTING and trainer.state.finished:
                raise RuntimeError(
                    "save_checkpoint() after fit by ddp_spawn, ddp_fork or ddp_notebook: averages and states of "
                    "optimizers are gone with its processes. Take what a ModelCheckpoint has saved, or train with ddp"
                )
            return
        if self._is_interrupted:
            checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()
        if self._at_end is None:
            entries = self._entries(checkpoint["state_dict"])
            checkpoint["state_dict"] = self._average_of(trainer)
        else:
            entries, states = self._at_end
            checkpoint["optimizer_states"] = states or checkpoint["optimizer_states"]
        if _is_sharded(checkpoint["state_dict"]):
            # The strategy saves the shards of the model and of optimizers, each under a name of its own, and no others.
            checkpoint[KEY] = {"shards": f"optimizer_{len(checkpoint['optimizer_states'])}"}
            checkpoint["optimizer_states"].append(entries)
        else:
            checkpoint[KEY] = entries
        if self._is_interrupted:
            self._is_interrupted = False
            for key in (KEY, "optimizer_states"):  # which Lightning writes when the average is back in the model
                checkpoint[key] = _copied(checkpoint[key])
            self._enter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the average in the model, and keeps the weights and averages for a later ``save_checkpoint``."""
        entries = self._entries(trainer.strategy.lightning_module_state_dict())
        # ShardedASGD would take the average, which is written to the model below, for weights to go on from.
        states = [trainer.strategy.optimizer_state(optimizer) for optimizer in self._optimizers]
        saves = trainer.is_global_zero or _is_sharded(entries["weights"])
        self._at_end = (_copied(entries), states) if saves else ({}, [])
        with self._averaged():
            averaged = _copied(get_model_state_dict(pl_module))
        set_model_state_dict(pl_module, averaged)

    def _average_of(self, trainer: Trainer) -> dict[str, Any]:
        """Returns the model's state dict with the average; nothing on ranks that do not save. Collective."""
        with self._averaged():
            state = trainer.strategy.lightning_module_state_dict()
            return _copied(state) if trainer.is_global_zero or _is_sharded(state) else {}

    def _entries(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what a training goes on from: the weights as they are given, and the averages. Collective.

        Averages are sharded if the weights are. Otherwise rank 0 has them whole, and other ranks, which do not save,
        have none.
        """
        if self.averages is None:
            return {"weights": weights}
        state = self.averages.state_dict()
        if not _is_sharded(weights):
            for average in self.averages.names:
                whole = self.averages.full_state_dict(average)
                state[average] = {name: whole[name] for name in state[average]} if whole else {}
        return {"weights": weights, "averages": state}


def _is_sharded(state: Mapping[str, Any]) -> bool:
    return any(isinstance(value, DTensor) for value in state.values())


def _copied(state: Any) -> Any:
    """Returns a state dict whose tensors later writes do not change."""
    if isinstance(state, Mapping):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_copied(value) for value in state]
    return state.detach().clone() if isinstance(state, torch.Tensor) else state
