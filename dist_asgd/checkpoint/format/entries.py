"""Tensors of a checkpoint: their description in the files, and their blocks in the memory of a rank.

[Note: words]
- *key*: the name of an entry, the path in the nested state joined by dots, as torch.distributed.checkpoint joins it:
  ``model.wte.weight``, ``optimizer.state.wte.weight.ax``, ``optimizer.param_groups.0.lr``.
- *entry*: a tensor, or a value: anything else, which JSON can express.
- *block*: a box of a tensor's own shape with its elements. A rank has none, one or several of each tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_asgd.boxes import Box


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
