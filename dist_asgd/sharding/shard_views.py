"""The parameters of a shard, wherever they lie."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_asgd._torch_private import local_tensor
from dist_asgd.sharding.layout import BucketLayout, Piece
from dist_asgd.sharding.placement import Placement


class PlacedParameters:
    """``ShardParameters`` that lie in the local tensors of ``params``, each on its own."""

    def __init__(
        self, params: Sequence[Tensor], layout: BucketLayout, placements: Sequence[Placement], rank: int
    ) -> None:
        self.params, self.placements = params, placements
        self.layout, self.pieces = layout, layout.pieces(rank)
        self.dtype, self.device = params[0].dtype, params[0].device
        self.local = [local_of(param) for param in params]
        self.flats = [placement.flatten(own) for own, placement in zip(self.local, placements, strict=True)]  # 1-D

    def read(self, where: slice = slice(None)) -> Tensor:
        start, stop, _ = where.indices(self.layout.shard_numel)
        parts = self._parts(self._within(start, stop), start, stop)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def copy(self) -> Tensor:
        return torch.cat(self._parts(self.pieces, 0, self.layout.shard_numel))

    def blocks(self, where: slice, size: int) -> Iterator[tuple[int, Tensor]]:
        start, stop, _ = where.indices(self.layout.shard_numel)
        small: list[Piece] = []  # neighbours, to be read together
        for piece in self._within(start, stop):
            if small and piece.shard_stop - small[0].shard_start > size:
                yield self._block(small)
                small = []
            if piece.stop - piece.start <= size:
                small.append(piece)
            else:
                yield from blocks_of(self.own(piece), piece.shard_start, size)
        if small:
            yield self._block(small)

    def own(self, piece: Piece) -> Tensor:
        flat = self.flats[piece.position]
        return flat if len(flat) == piece.stop - piece.start else flat[piece.start : piece.stop]

    def write(self, where: slice, values: Tensor) -> None:
        start, stop, _ = where.indices(self.layout.shard_numel)
        for piece in self._within(start, stop):
            self.own(piece).copy_(values[piece.shard_start - start : piece.shard_stop - start])

    def wrap(self, position: int, local: Tensor) -> Tensor:
        param = self.params[position]
        if not isinstance(param, DTensor):
            return local
        # torch copies a DTensor whose local tensor begins in the middle of a storage as if the storage were its own.
        own = torch.from_dlpack(local) if local.numel() else torch.empty_like(local)
        # Without shape and stride it would assume that all ranks have as much, and ask them.
        return DTensor.from_local(
            own, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
        )

    def _block(self, pieces: Sequence[Piece]) -> tuple[int, Tensor]:
        start, stop = pieces[0].shard_start, pieces[-1].shard_stop
        parts = self._parts(pieces, start, stop)
        return start, torch.cat(parts) if len(parts) > 1 else parts[0]

    def _parts(self, pieces: Iterable[Piece], start: int, stop: int) -> list[Tensor]:
        parts, end = [], start
        for piece in pieces:
            if piece.shard_start > end:
                parts.append(self._gap(piece.shard_start - end))
            parts.append(self.own(piece))
            end = piece.shard_stop
        if stop > end or not parts:
            parts.append(self._gap(stop - end))
        return parts

    def _within(self, start: int, stop: int) -> list[Piece]:
        return [piece for piece in self.pieces if start <= piece.shard_start and piece.shard_stop <= stop]

    def _gap(self, numel: int) -> Tensor:
        return torch.zeros(numel, dtype=self.dtype, device=self.device)


def local_of(param: Tensor) -> Tensor:
    """What this rank has of the parameter, without a history."""
    return local_tensor(param) if isinstance(param, DTensor) else param.detach()


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
