"""``Placement``: the shape, strides and position that this rank's block of a parameter has, in pure integers."""

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
    """How what a rank has of a parameter lies in its bucket: its shape, and the strides it keeps there.

    A dense tensor keeps its memory order (channels_last, transposed), so that its gradient has the same order and is
    moved without a permutation. ``order`` lists the dims from the slowest to the fastest varying one. Of a DTensor it
    is the local tensor, which is the block of the ``whole`` parameter at ``offsets``.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    order: tuple[int, ...]
    offsets: tuple[int, ...]
    whole: tuple[int, ...]  # shape of the whole parameter

    @classmethod
    def of(cls, tensor: Tensor) -> Placement:
        """Of a parameter, or of a value that is placed as one."""
        local, offsets = tensor, (0,) * tensor.ndim
        if isinstance(tensor, DTensor):
            local, offsets = local_tensor(tensor), tuple(tensor.__create_chunk_list__()[0].offsets)
        strides = torch.empty_like(local, device="meta").stride()  # those of a dense copy
        order = sorted(range(local.ndim), key=lambda dim: -strides[dim] if local.shape[dim] != 1 else -math.inf)
        return cls(tuple(local.shape), tuple(strides), tuple(order), offsets, tuple(tensor.shape))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_row_major(self) -> bool:
        return self.order == tuple(range(len(self.shape)))

    def view(self, flat: Tensor) -> Tensor:
        """The parameter's own view of its ``numel`` elements in memory order."""
        return flat.as_strided(self.shape, self.strides, flat.storage_offset())

    def flatten(self, tensor: Tensor) -> Tensor:
        """The elements of a tensor of this shape in the parameter's memory order, 1-D; a copy only where it must be."""
        if tensor.ndim == 1 and tensor.is_contiguous():
            return tensor
        return tensor.permute(self.order).reshape(-1)

    def same_block(self, other: Placement) -> bool:
        """Whether both are the same block of a parameter, or empty."""
        same = self.shape == other.shape and self.offsets == other.offsets
        return same or not (self.numel or other.numel)

    def block_of(self, value: Tensor) -> Tensor:
        """This rank's block, of ``shape``, of a ``value`` of the whole parameter, or of a DTensor that has it."""
        if isinstance(value, DTensor):
            return local_tensor(value)
        for dim, (offset, size) in enumerate(zip(self.offsets, self.shape, strict=True)):
            value = value.narrow(dim, min(offset, value.shape[dim]), size)  # empty ones may begin behind the end
        return value

    def new_whole(self, dtype: torch.dtype) -> Tensor:
        """A whole tensor on the CPU, not filled; in the parameter's memory order where the rank has all of it."""
        if self.shape == self.whole:
            return torch.empty_strided(self.whole, self.strides, dtype=dtype, device="cpu")
        return torch.empty(self.whole, dtype=dtype, device="cpu")

    def fill(self, whole: Tensor, start: int, flat: Tensor) -> None:
        """Writes ``flat``, the elements from ``start`` on of what the rank has, to where they belong in ``whole``."""
        offset = 0
        for box in self.boxes(start, start + len(flat)):
            part = whole
            for dim, (first, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
                part = part.narrow(dim, first, size)
            part.copy_(self.box_view(flat[offset : offset + box.numel], box))
            offset += box.numel

    def boxes(self, start: int, stop: int) -> list[Box]:
        """The blocks of the whole parameter that the flat range covers, in the order of their elements."""
        return [
            Box(tuple(map(operator.add, self.offsets, self._unpermute(box.offsets))), self._unpermute(box.sizes))
            for box in boxes([self.shape[dim] for dim in self.order], start, stop)
        ]

    def box_view(self, flat: Tensor, box: Box) -> Tensor:
        """``flat``, the elements of ``box`` in memory order, as a tensor of the box's sizes."""
        permuted = flat.view([box.sizes[dim] for dim in self.order])
        return permuted.permute(self._unpermute(range(len(self.order))))

    def _unpermute(self, values: Sequence[int]) -> tuple[int, ...]:
        result = [0] * len(self.order)
        for value, dim in zip(values, self.order, strict=True):
            result[dim] = value
        return tuple(result)
