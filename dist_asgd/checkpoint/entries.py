"""What a checkpoint holds, entry by entry: the words that its reader, its writer and the live state have in common.

[Note: words]
- *key*: the name of an entry, its path in the nested state joined by dots, as torch.distributed.checkpoint has it:
  ``model.wte.weight``, ``optimizer.state.wte.weight.ax``, ``optimizer.param_groups.0.lr``.
- *entry*: a tensor, or a value: anything else, which JSON can express.
- *block*: a box of a tensor's own shape with its elements. A rank has none, one or several of each tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_asgd.layout import Box


class CheckpointError(Exception):
    """A checkpoint could not be saved or loaded. Says which file and which key, and what to do."""


class NotCommitted(CheckpointError):
    """Something of a checkpoint is there, but it never was finished, or is being deleted: it does not exist."""


@dataclass(frozen=True, slots=True)
class Block:
    box: Box
    data: Tensor  # of the box's sizes, any strides; live memory: read when saving, written to when loading


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor as one rank has it."""

    shape: tuple[int, ...]  # of the whole tensor
    dtype: torch.dtype
    blocks: Sequence[Block]  # this rank's, disjoint; other ranks may have the same ones


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor as a checkpoint has it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
