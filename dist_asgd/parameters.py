"""The parameters of a shard, wherever they lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from dist_asgd.layout import Piece


class ShardParameters(Protocol):
    """The parameters of a shard, wherever they lie, indexed as the shard."""

    dtype: torch.dtype
    device: torch.device

    def read(self, where: slice = slice(None)) -> Tensor:
        """1-D. It may be the parameters themselves: not to be written to."""

    def copy(self) -> Tensor:
        """All of it, in memory of its own."""

    def own(self, piece: Piece) -> Tensor:
        """A part of it, 1-D and contiguous: the parameters themselves."""

    def write(self, where: slice, values: Tensor) -> None:
        """``where`` begins and ends between parameters."""

    def blocks(self, where: slice, size: int) -> Iterator[tuple[int, Tensor]]:
        """All of ``where``, as ``read``, in blocks of up to ``size`` elements, each with where it begins."""

    def wrap(self, position: int, local: Tensor) -> Tensor:
        """``local``, all that the parameter has on this rank, as a tensor that is placed as the parameter is."""


class FlatParameters:
    """``ShardParameters`` in one 1-D tensor, ``shard``."""

    def __init__(self, shard: Tensor) -> None:
        self.shard, self.dtype, self.device = shard, shard.dtype, shard.device

    def read(self, where: slice = slice(None)) -> Tensor:
        return self.shard[where]

    def copy(self) -> Tensor:
        return self.shard.clone()

    def own(self, piece: Piece) -> Tensor:
        return self.shard[piece.shard_start : piece.shard_stop]

    def write(self, where: slice, values: Tensor) -> None:
        self.shard[where].copy_(values)

    def blocks(self, where: slice, size: int) -> Iterator[tuple[int, Tensor]]:
        return blocks_of(self.shard[where], where.start, size)

    def wrap(self, position: int, local: Tensor) -> Tensor:
        return local


def blocks_of(flat: Tensor, start: int, size: int) -> Iterator[tuple[int, Tensor]]:
    """``flat`` (1-D), whose first element is number ``start``, in blocks of up to ``size`` elements, with theirs."""
    return ((start + number * size, block) for number, block in enumerate(flat.split(size)))
