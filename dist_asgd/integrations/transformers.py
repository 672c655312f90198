"""transformers: ``AveragingTrainer``, which evaluates on averages, and a callback that keeps them in any trainer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.distributed.fsdp import StateDictType
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from dist_asgd import ShardedASGD, ShardedAverages
from dist_asgd._torch_private import is_fsdp1_slice
from dist_asgd.averages.kinds import Average
from dist_asgd.checkpoint import CheckpointError
from dist_asgd.comm.digests import digests
from dist_asgd.integrations.accelerate import require_sharded_files, unwrapped_optimizer
from dist_asgd.integrations.checkpoint_folder import FOLDER, SavedApart, load_folder, missing_folder, save_folder

RESUME_ADVICE = (
    "Resume from a checkpoint in output_dir that was saved with averages; or load its weights into the model, and "
    "train without resume_from_checkpoint"
)


class AveragingCallback(TrainerCallback):
    """Keeps averages beside the optimizer of any ``Trainer``, and saves their shards with its checkpoints.

    The averages are built when training begins, after the model was placed. They lie in the folder ``dist_asgd`` of
    each checkpoint, and are loaded from it when training is resumed, on any number of processes. A callback is not told
    which checkpoint is resumed, and takes the one of the step in ``output_dir``, which must have the weights that are
    resumed; an ``AveragingTrainer`` tells it. Evaluation is of the raw weights, unless the trainer is an
    ``AveragingTrainer``.

    Args:
        average: kinds of ``ShardedAverages`` to keep. None is for ``AveragingTrainer``, with a ``ShardedASGD``.
        options: of ``ShardedAverages``, such as ``start`` and ``buffers``.

    Attributes:
        averages: the ``ShardedAverages`` or ``ShardedASGD``; None before training.
        resume_from: the checkpoint that is resumed; None for the one of the present step in ``output_dir``.
        best: what ``load`` needs to be told of the average by which the best model is chosen; None if it is chosen by
            the raw weights.
    """

    def __init__(self, average: Average | Mapping[str, Average] | None = None, **options: Any) -> None:
        self.averages: ShardedASGD | ShardedAverages | None = None
        self.resume_from: str | None = None
        self.best: bool | str | None = None
        self._average, self._options = average, options
        self._optimizer: Optimizer | None = None  # whose averages are kept
        self._apart: SavedApart | None = None
        self._state: dict[str, Any] = {}  # what the folder of a checkpoint has

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Refuses arguments with which checkpoints would lack averages."""
        if args.enable_jit_checkpoint and (self.best is None or args.world_size > 1):
            raise ValueError(
                "enable_jit_checkpoint=True works with an AveragingTrainer in one process: a callback is not told of "
                "its checkpoints, and several processes would begin them at different steps. Leave it out, and set "
                "save_steps to the steps that may be lost"
            )
        if args.save_only_model:
            raise ValueError(
                "save_only_model=True leaves averages and the state of optimizers out of checkpoints: leave it out, "
                "and ship weights by save_model() inside of averaged_parameters()"
            )

    def keep_apart(self, optimizer: ShardedASGD) -> None:
        """Takes the state of ``optimizer`` into the folder; to be called before a trainer loads its own files."""
        if optimizer is not self._optimizer:
            self._optimizer, self._apart, self.averages = optimizer, SavedApart(optimizer), None

    def hide(self, hidden: bool) -> None:
        """Sets whether the trainer's file gets a placeholder in place of the state of the optimizer."""
        if self._apart is not None:
            self._apart.hidden = hidden

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Builds the averages, and loads them where training is resumed. Collective.

        Raises:
            CheckpointError: on every rank, where the checkpoint has no averages, or others, or those of other weights.
        """
        optimizer, model = unwrapped_optimizer(objects["optimizer"]), objects["model"]
        if self.averages is None or optimizer is not self._optimizer:
            self._build(optimizer, extract_model_from_parallel(model, keep_torch_compile=False))
        if state.global_step:
            folder = Path(self.resume_from or _checkpoint(args, state)) / FOLDER
            loaded: dict[str, Any] = {"weights": {}}
            if not load_folder(folder, loaded):
                raise missing_folder(folder, RESUME_ADVICE)
            _require_weights(loaded["weights"], model, folder)
            load_folder(folder, self._state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any) -> None:
        """Saves the averages into the checkpoint that a trainer has just written. Collective.

        An ``AveragingTrainer`` has saved them already, before it deleted older checkpoints.
        """
        self.hide(False)
        if self.best is None:
            self.save(args, state, objects["model"])

    def save(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        """Saves the averages into the folder of the checkpoint of the present step. Collective."""
        self.hide(False)  # after a save that has failed
        save_folder(Path(_checkpoint(args, state)) / FOLDER, self._state | {"weights": _digests(model)})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Makes the average of the best checkpoint the weights, where the best model was chosen by it. Collective."""
        self.hide(False)  # after a checkpoint on SIGTERM, which ends without on_save
        best = state.best_model_checkpoint
        if self.best is None or not args.load_best_model_at_end or best is None:
            return
        folder, model = Path(best) / FOLDER, objects["model"]
        # The trainer has loaded all other weights.
        if not load_folder(folder, {"model": model}, average=self.best, strict=False, cast=True):
            raise missing_folder(folder, RESUME_ADVICE)
        self.averages = None  # they are of the last step, and the weights no longer

    def _build(self, optimizer: Optimizer, module: nn.Module) -> None:
        if self._average is not None:
            self.averages = ShardedAverages(
                module.named_parameters(), self._average, optimizer=optimizer, module=module, **self._options
            )
            self._optimizer, self._state = optimizer, {"averages": self.averages}
        elif isinstance(optimizer, ShardedASGD) and self._apart is not None:
            self.averages, self._state = optimizer, {"model": module, "optimizer": optimizer}
        else:
            raise ValueError(
                f"no average is kept: pass average= beside {type(optimizer).__name__}, or train with ShardedASGD by "
                "AveragingTrainer"
            )


class Averaging:
    """Mixin for ``Trainer`` and classes derived from it, in front of them: ``class T(Averaging, SFTTrainer): pass``.

    Evaluates and predicts on an average, so that the best model is chosen by it, and ``load_best_model_at_end`` loads
    that average. Checkpoints have the shards of averages, and all state of a ``ShardedASGD``, in the folder
    ``dist_asgd``; ``train(resume_from_checkpoint=...)`` loads them on any number of processes. Weights, other
    optimizers and schedulers stay in the trainer's own files.

    Args:
        average: kinds of ``ShardedAverages`` to keep beside the optimizer. None is for a ``ShardedASGD``, which keeps
            its own: ``optimizer_cls_and_kwargs=(ShardedASGD, {"t0": 1000})``. Where they are left out there, ``lr`` is
            the one of the training arguments, and gradients are ``"reduced"``.
        evaluate_on: the name of the average to evaluate on; None for the first.
        average_options: options of ``ShardedAverages``.
        args, kwargs: of the ``Trainer``.

    Raises:
        ValueError: for arguments that do not fit together, or with which checkpoints would lack averages.
    """

    def __init__(
        self,
        *args: Any,
        average: Average | Mapping[str, Average] | None = None,
        evaluate_on: str | None = None,
        average_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._averaging, self._evaluate_on = AveragingCallback(average, **(average_options or {})), evaluate_on
        self._averaging.best = evaluate_on or True
        kwargs["callbacks"] = [self._averaging, *(kwargs.get("callbacks") or [])]
        super().__init__(*args, **kwargs)

    @property
    def averages(self) -> ShardedASGD | ShardedAverages | None:
        """What keeps the averages; None before training, and once the best average is the weights."""
        return self._averaging.averages

    def averaged_parameters(self, name: str | None = None) -> contextlib.AbstractContextManager[None]:
        """Inside the block, the model has an average, also for ``save_model``. Collective.

        Where there are no averages, the block changes nothing.

        Args:
            name: which average; None for the one that is evaluated on.
        """
        if self.averages is None:
            return contextlib.nullcontext()
        return self.averages.averaged_parameters(self._evaluate_on if name is None else name)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates or predicts, as the ``Trainer`` does, with the average as the weights. Collective."""
        with self.averaged_parameters():
            return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains as the ``Trainer`` does. Resuming loads the averages as well."""
        last = resume_from_checkpoint
        if isinstance(last, bool):
            last = get_last_checkpoint(self.args.output_dir) if last else None  # type: ignore[attr-defined]
        self._averaging.resume_from = last
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """Creates the optimizer as the ``Trainer`` does."""
        of_trainer: Any = self
        build, options = of_trainer.optimizer_cls_and_kwargs or (None, {})
        if isinstance(build, type) and issubclass(build, ShardedASGD):
            if of_trainer.is_fsdp_enabled:
                remedy = 'fsdp_config={..., "state_dict_type": "SHARDED_STATE_DICT"}, which is not its default'
                require_sharded_files(of_trainer.accelerator.state.fsdp_plugin, remedy)
            given: dict[str, Any] = {"lr": of_trainer.args.learning_rate, "gradients": "reduced"}
            given |= {"module": of_trainer.model} if of_trainer.is_fsdp_enabled else {}
            of_trainer.optimizer_cls_and_kwargs = build, given | options
        optimizer: Optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        inner = unwrapped_optimizer(of_trainer.optimizer)
        if isinstance(inner, ShardedASGD):
            self._averaging.keep_apart(inner)
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the weights as the ``Trainer`` does; the average inside of ``averaged_parameters()``. Collective.

        Under FSDP with ``SHARDED_STATE_DICT``, where a ``Trainer`` writes no file at all, they are gathered and saved.
        """
        of_trainer: Any = self
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        if not _internal_call and of_trainer.is_fsdp_enabled:
            accelerator = of_trainer.accelerator
            if accelerator.state.fsdp_plugin.state_dict_type is not StateDictType.FULL_STATE_DICT:
                whole = accelerator.get_state_dict(of_trainer.model)
                of_trainer._save(output_dir or of_trainer.args.output_dir, state_dict=whole)
        if _internal_call and output_dir is not None:  # a checkpoint, before the trainer deletes older ones
            self._averaging.save(of_trainer.args, of_trainer.state, of_trainer.model)
            self._averaging.hide(not of_trainer.is_fsdp_enabled)  # the optimizer's file comes next; FSDP shards it


class AveragingTrainer(Averaging, Trainer):
    """``Trainer`` that evaluates on averages and saves them: see ``Averaging``."""


def _checkpoint(args: TrainingArguments, state: TrainerState) -> str:
    """Returns the folder of the checkpoint of the present step."""
    if state.is_hyper_param_search:
        raise ValueError("hyperparameter_search() keeps checkpoints elsewhere, so averages cannot be saved with them")
    return os.path.join(str(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def _digests(model: nn.Module) -> dict[str, str]:
    """Returns dtype and digest of each parameter that this rank has as a whole."""
    whole = {
        name: param
        for name, param in model.named_parameters()
        if not isinstance(param, DTensor) and not is_fsdp1_slice(param)
    }
    found = digests([param.detach() for param in whole.values()])
    return {name: f"{param.dtype} {digest}" for (name, param), digest in zip(whole.items(), found, strict=True)}


def _require_weights(saved: Mapping[str, str], model: nn.Module, folder: Path) -> None:
    """Raises ``CheckpointError`` where the model has not the weights beside which averages were saved.

    Weights in another dtype than the saved ones pass, because they were rounded.
    """
    live = _digests(model)
    for name in saved.keys() & live.keys():
        if saved[name].split()[0] == live[name].split()[0] and saved[name] != live[name]:
            raise CheckpointError(
                f"the averages in {folder} were saved beside other weights than those that are resumed ({name} "
                f"differs), perhaps in another run. {RESUME_ADVICE}"
            )
