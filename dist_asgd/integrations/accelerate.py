"""Accelerate: averages of a prepared model, saved by ``save_state`` and loaded by ``load_state``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import StateDictType
from torch.optim import Optimizer

from dist_asgd import ShardedASGD, ShardedAverages
from dist_asgd.averages.kinds import Average
from dist_asgd.integrations.checkpoint_folder import FOLDER, SavedApart, load_folder, missing_folder, save_folder


def unwrapped_optimizer(optimizer: Optimizer) -> Optimizer:
    """Returns the optimizer that ``Accelerator.prepare`` was given, of the one that it has returned."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def keep_averages(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    average: Average | Mapping[str, Average] | None = None,
    **options: Any,
) -> ShardedASGD | ShardedAverages:
    """Returns what keeps averages of ``model``, and lets ``accelerator`` save and load them. Collective.

    From now on ``save_state`` writes their shards, and all state of a ``ShardedASGD``, into the folder ``dist_asgd`` of
    the checkpoint, ``dist_asgd_1`` for a second call and so on. ``load_state`` reads them on any number of processes.
    Weights, other optimizers, schedulers and samplers stay in Accelerate's own files.

    Args:
        accelerator: the one that has prepared ``model`` and ``optimizer``.
        model, optimizer: what ``accelerator.prepare`` has returned.
        average: the kinds of ``ShardedAverages`` to keep; None where ``optimizer`` is a ``ShardedASGD``, which keeps
            its own.
        options: of ``ShardedAverages``, such as ``start`` and ``buffers``.

    Returns:
        The ``ShardedASGD``, or new ``ShardedAverages``: evaluate inside of its ``averaged_parameters()``.

    Raises:
        TypeError: ``optimizer`` was not prepared.
        ValueError: ``average`` is missing, or ``model`` is not the one of ``optimizer``; as for ``ShardedAverages``;
            for a ``ShardedASGD`` under FSDP with ``FULL_STATE_DICT``.
    """
    if not isinstance(optimizer, AcceleratedOptimizer):
        raise TypeError(
            f"optimizer must be what accelerator.prepare() has returned, got {type(optimizer).__name__}: call "
            "keep_averages() after prepare(), which may replace the parameters"
        )
    inner, module = unwrapped_optimizer(optimizer), accelerator.unwrap_model(model)
    _require_same_parameters(module, inner)
    kept = _averages(inner, module, average, options)
    if isinstance(inner, ShardedASGD) and accelerator.distributed_type is DistributedType.FSDP:
        require_sharded_files(
            accelerator.state.fsdp_plugin, 'FullyShardedDataParallelPlugin(state_dict_type="SHARDED_STATE_DICT", ...)'
        )
    others = [item for item in accelerator._custom_objects if isinstance(item, _Attachment)]
    attachment = _Attachment(accelerator, module, kept, f"{FOLDER}_{len(others)}" if others else FOLDER)
    accelerator.register_save_state_pre_hook(attachment.before_save)
    accelerator.register_load_state_pre_hook(attachment.before_load)
    accelerator.register_for_checkpointing(attachment)
    return kept


def require_sharded_files(plugin: FullyShardedDataParallelPlugin, remedy: str) -> None:
    """Raises ``ValueError`` where Accelerate would save a whole state of a ``ShardedASGD``, which it could not load.

    torch takes the device of whole states from the optimizer's tensors, and a new ``ShardedASGD`` has no averages yet.

    Args:
        plugin: the settings of FSDP.
        remedy: what the user is to pass.
    """
    if plugin.state_dict_type is StateDictType.FULL_STATE_DICT:
        raise ValueError(f"ShardedASGD under FSDP cannot be resumed from FULL_STATE_DICT: pass {remedy}")


def _averages(
    optimizer: Optimizer, module: nn.Module, average: Average | Mapping[str, Average] | None, options: dict[str, Any]
) -> ShardedASGD | ShardedAverages:
    if average is not None:
        return ShardedAverages(module.named_parameters(), average, optimizer=optimizer, module=module, **options)
    if not isinstance(optimizer, ShardedASGD):
        raise ValueError(f"{type(optimizer).__name__} keeps no averages: pass average=, such as EMA(0.999)")
    if options:
        raise ValueError(f"{', '.join(options)}: options of ShardedAverages need average=")
    return optimizer


def _require_same_parameters(module: nn.Module, optimizer: Optimizer) -> None:
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    if held.isdisjoint(map(id, module.parameters())):
        raise ValueError(
            "optimizer has no parameter of model: pass both as the same accelerator.prepare(model, optimizer) has "
            "returned them"
        )


class _Attachment:
    """Object that ``Accelerator`` saves and loads last, after its own files.

    ``save_state`` calls ``before_save``, then ``state_dict`` of optimizers, and at the end that of this object.
    ``load_state`` calls ``before_load``, loads its files, and at the end calls ``load_state_dict`` of this object.
    """

    def __init__(
        self, accelerator: Accelerator, module: nn.Module, averages: ShardedASGD | ShardedAverages, name: str
    ) -> None:
        self._accelerator, self._name, self._checkpoint = accelerator, name, Path()
        self._apart: SavedApart | None = None
        self._state: dict[str, Any] = {"averages": averages}
        if isinstance(averages, ShardedASGD):
            self._apart, self._state = SavedApart(averages), {"model": module, "optimizer": averages}

    def before_save(self, models: list[nn.Module], weights: list[dict[str, Any]], output_dir: str) -> None:
        """Hook of ``save_state``. Collective."""
        self._hide(False)  # after a save that has failed
        save_folder(Path(output_dir) / self._name, self._state)
        self._hide(True)

    def state_dict(self) -> dict[str, Any]:
        """Returns what Accelerate's own file is to hold."""
        self._hide(False)
        return {"folder": self._name}

    def before_load(self, models: list[nn.Module], input_dir: str) -> None:
        """Hook of ``load_state``. Collective: a save may have ended on this process, and not on the one that writes."""
        self._accelerator.wait_for_everyone()
        self._checkpoint = Path(input_dir)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads the folder of the checkpoint that ``load_state`` is loading. Collective."""
        folder = self._checkpoint / self._name
        if not load_folder(folder, self._state):
            raise missing_folder(folder, "Load a checkpoint that was saved after keep_averages()")

    def _hide(self, hidden: bool) -> None:
        if self._apart is not None:
            self._apart.hidden = hidden
