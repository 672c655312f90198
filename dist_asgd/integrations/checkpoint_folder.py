"""Sharded state in a folder of its own inside of a framework's checkpoint, and its absence from the framework's files.

Frameworks write an optimizer's state dict by ``torch.save`` on one rank, which has its own pieces only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from dist_asgd import Checkpointer, ShardedASGD
from dist_asgd.checkpoint import CheckpointError

FOLDER = "dist_asgd"  # name of the folder in a framework's checkpoint

# What a framework's file has in place of an optimizer's state. torch's optimizers refuse it: they have param groups.
PLACEHOLDER: dict[str, Any] = {"state": {}, "param_groups": [], "sharded_state": f"is in the folder {FOLDER}"}


def save_folder(url: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Saves ``state`` into the folder ``url``, in the place of what an earlier save has left there. Collective.

    The former state is deleted when the new one is committed, so a process that is killed leaves one of them.

    Raises:
        CheckpointError: on every rank, as for ``Checkpointer.save``.
    """
    with Checkpointer(url, keep_last=1) as checkpoints:
        latest = checkpoints.latest()
        checkpoints.save(0 if latest is None else latest + 1, state)


def load_folder(url: str | os.PathLike[str], state: Mapping[str, Any], **how: Any) -> bool:
    """Loads what ``save_folder`` has saved, on any number of ranks; False if there is nothing. Collective.

    Args:
        url, state: as for ``save_folder``.
        how: options of ``Checkpointer.load``.

    Raises:
        CheckpointError: on every rank, as for ``Checkpointer.load``.
    """
    with Checkpointer(url) as checkpoints:
        return checkpoints.load(state, **how) is not None


def missing_folder(url: str | os.PathLike[str], advice: str) -> CheckpointError:
    """Returns the error for a checkpoint of a framework that has no folder ``url``."""
    return CheckpointError(
        f"{os.fspath(url)} does not exist, so this checkpoint has neither averages nor sharded state. {advice}"
    )


class SavedApart:
    """Keeps the state of a ``ShardedASGD`` out of the files of a framework, by torch's hooks of state dicts.

    A framework that loads the placeholder leaves the state as it is.

    Attributes:
        hidden: whether ``state_dict()`` of the optimizer returns the placeholder.
    """

    def __init__(self, optimizer: ShardedASGD) -> None:
        self.hidden = False
        optimizer.register_state_dict_post_hook(self._replace)
        optimizer.register_load_state_dict_pre_hook(self._ignore)

    def _replace(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        return dict(PLACEHOLDER) if self.hidden else None

    def _ignore(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        if "sharded_state" not in state_dict:
            return None
        hidden, self.hidden = self.hidden, False
        try:
            return optimizer.state_dict()
        finally:
            self.hidden = hidden
