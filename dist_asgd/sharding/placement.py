"""``Placement``: shape, memory order and position of this rank's block of a parameter, in pure integers."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_asgd._torch_private import local_tensor
from dist_asgd.boxes import Box, boxes


@dataclass(frozen=True)
class Placement:
    """Shape, memory order and position of the block that this rank has of a parameter.

    The block of a DTensor is its local tensor; the block of any other parameter is the whole parameter. The block keeps
    its memory order (channels_last, transposed) in the bucket. Its gradient has that order as well, so gradients move
    without a permutation.

    Pickles of ``StatePiece`` contain placements, so fields keep their names.
    """

    shape: tuple[int, ...]  # sizes of the block
    strides: tuple[int, ...]  # strides of a dense tensor in the memory order of the block
    order: tuple[int, ...]  # dims from the slowest to the fastest varying one
    offsets: tuple[int, ...]  # position of the block in the whole parameter
    whole: tuple[int, ...]  # shape of the whole parameter

    @classmethod
    def of(cls, tensor: Tensor) -> Placement:
        """Returns the placement of a parameter, or of a value that is sharded as a parameter is."""
        local, offsets = tensor, (0,) * tensor.ndim
        if isinstance(tensor, DTensor):
            local, offsets = local_tensor(tensor), tuple(tensor.__create_chunk_list__()[0].offsets)
        strides = torch.empty_like(local, device="meta").stride()  # empty_like makes them dense
        order = sorted(range(local.ndim), key=lambda dim: -strides[dim] if local.shape[dim] != 1 else -math.inf)
        return cls(tuple(local.shape), tuple(strides), tuple(order), offsets, tuple(tensor.shape))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_row_major(self) -> bool:
        return self.order == tuple(range(len(self.shape)))

    def view(self, flat: Tensor) -> Tensor:
        """Returns a view of ``flat`` (1-D, ``numel`` elements in memory order) with the block's shape and strides."""
        return flat.as_strided(self.shape, self.strides, flat.storage_offset())

    def flatten(self, tensor: Tensor) -> Tensor:
        """Returns ``tensor``, which has the shape of the block, 1-D in memory order: a view where possible."""
        if tensor.ndim == 1 and tensor.is_contiguous():
            return tensor
        return tensor.permute(self.order).reshape(-1)

    def same_block(self, other: Placement) -> bool:
        """Whether both placements describe one block of a parameter, or are both empty."""
        same = self.shape == other.shape and self.offsets == other.offsets
        return same or not (self.numel or other.numel)

    def block_of(self, value: Tensor) -> Tensor:
        """Returns this rank's block of ``value``, which has the shape of the whole parameter or is a DTensor."""
        if isinstance(value, DTensor):
            return local_tensor(value)
        for dim, (offset, size) in enumerate(zip(self.offsets, self.shape, strict=True)):
            value = value.narrow(dim, min(offset, value.shape[dim]), size)  # an empty block may begin behind the end
        return value

    def new_whole(self, dtype: torch.dtype) -> Tensor:
        """Returns an uninitialized CPU tensor of shape ``whole``, in the memory order of a block that is the whole."""
        if self.shape == self.whole:
            return torch.empty_strided(self.whole, self.strides, dtype=dtype, device="cpu")
        return torch.empty(self.whole, dtype=dtype, device="cpu")

    def fill(self, whole: Tensor, start: int, flat: Tensor) -> None:
        """Copies ``flat``, the elements of the block from ``start`` on, to their positions in ``whole``."""
        offset = 0
        for box in self.boxes(start, start + len(flat)):
            part = tuple(slice(first, first + size) for first, size in zip(box.offsets, box.sizes, strict=True))
            whole[part].copy_(self.box_view(flat[offset : offset + box.numel], box))
            offset += box.numel

    def boxes(self, start: int, stop: int) -> list[Box]:
        """Returns the boxes of the whole parameter that the block's elements ``[start, stop)`` fill, in order."""
        return [
            Box(tuple(map(operator.add, self.offsets, self._unpermute(box.offsets))), self._unpermute(box.sizes))
            for box in boxes([self.shape[dim] for dim in self.order], start, stop)
        ]

    def box_view(self, flat: Tensor, box: Box) -> Tensor:
        """Returns a view of ``flat``, the elements of ``box`` in memory order, that has the sizes of the box."""
        permuted = flat.view([box.sizes[dim] for dim in self.order])
        return permuted.permute(self._unpermute(range(len(self.order))))

    def _unpermute(self, values: Sequence[int]) -> tuple[int, ...]:
        return tuple(values[self.order.index(dim)] for dim in range(len(self.order)))
