"""Defines the entries of a checkpoint, in which the live state, the writer and the reader describe tensors.

[Note: words]
- *key*: the name of an entry, which is its path in the nested state joined by dots, as in torch.distributed.checkpoint:
  ``model.wte.weight``, ``optimizer.state.wte.weight.ax``, ``optimizer.param_groups.0.lr``.
- *entry*: a tensor, or a value. A value is anything else that JSON can express (format/json_values.py).
- *block*: a box of a tensor's own shape with its elements. A rank has none, one or several blocks of each tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_asgd.boxes import Box


@dataclass(frozen=True, slots=True)
class Block:
    """A box of a tensor, and the live memory that is read when saving and written to when loading."""

    box: Box
    data: Tensor  # N-d with the box's sizes, any strides, the entry's dtype, any device


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor of the live state, with the blocks that this rank holds."""

    shape: tuple[int, ...]  # of the whole tensor
    dtype: torch.dtype
    blocks: Sequence[Block]  # of this rank, disjoint; replicas hold equal blocks on several ranks


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """Shape and dtype of a tensor in a checkpoint."""

    shape: tuple[int, ...]  # of the whole tensor
    dtype: torch.dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name of a dtype in files and messages: "float32" for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
