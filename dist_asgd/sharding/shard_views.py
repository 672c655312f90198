"""Access to the parameters of a shard, in one buffer (``FlatParameters``) or in separate tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_asgd._torch_private import local_tensor
from dist_asgd.sharding.layout import BucketLayout, Piece
from dist_asgd.sharding.placement import Placement


class FlatParameters:
    """Parameters of a shard that lie in one 1-D tensor, ``shard``; between and after them is padding.

    Positions count elements of ``shard``. Tensors that are returned may be the parameters themselves; only those of
    ``view_of`` may be written to.
    """

    def __init__(self, shard: Tensor) -> None:
        self.shard, self.dtype, self.device = shard, shard.dtype, shard.device

    def read(self, where: slice = slice(None)) -> Tensor:
        """Returns elements ``where``, 1-D."""
        return self.shard[where]

    def copy(self) -> Tensor:
        """Returns a copy of all elements, 1-D."""
        return self.shard.clone()

    def view_of(self, piece: Piece) -> Tensor:
        """Returns a 1-D contiguous view of the elements of ``piece``; writing to it changes the parameter."""
        return self.shard[piece.shard_start : piece.shard_stop]

    def write(self, where: slice, values: Tensor) -> None:
        """Writes ``values`` (1-D) to elements ``where``, which begins and ends between parameters."""
        self.shard[where].copy_(values)

    def wrap(self, position: int, local: Tensor) -> Tensor:
        """Returns ``local`` as the local tensor of a DTensor like the parameter; ``local`` itself for a plain one."""
        return local


class PlacedParameters:
    """Parameters of a shard that lie in the local tensors of ``params``, each in its own memory.

    The methods do what those of ``FlatParameters`` do, as if the parameters lay in one tensor with padding.

    Attributes:
        local: local tensors of ``params``, without autograd history.
        flats: ``local`` in memory order: 1-D views, or copies where a parameter is not dense.
    """

    def __init__(
        self, params: Sequence[Tensor], layout: BucketLayout, placements: Sequence[Placement], rank: int
    ) -> None:
        self.params, self.placements = params, placements
        self.layout, self.pieces = layout, layout.pieces(rank)
        self.dtype, self.device = params[0].dtype, params[0].device
        self.local = [local_of(param) for param in params]
        self.flats = [placement.flatten(own) for own, placement in zip(self.local, placements, strict=True)]

    def read(self, where: slice = slice(None)) -> Tensor:
        start, stop, _ = where.indices(self.layout.shard_numel)
        parts = self._parts(self._within(start, stop), start, stop)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def copy(self) -> Tensor:
        return torch.cat(self._parts(self.pieces, 0, self.layout.shard_numel))

    def view_of(self, piece: Piece) -> Tensor:
        flat = self.flats[piece.position]
        return flat if len(flat) == piece.stop - piece.start else flat[piece.start : piece.stop]

    def write(self, where: slice, values: Tensor) -> None:
        start, stop, _ = where.indices(self.layout.shard_numel)
        for piece in self._within(start, stop):
            self.view_of(piece).copy_(values[piece.shard_start - start : piece.shard_stop - start])

    def wrap(self, position: int, local: Tensor) -> Tensor:
        param = self.params[position]
        if not isinstance(param, DTensor):
            return local
        # torch copies a DTensor as if its local tensor began at the start of a storage. from_dlpack makes such a one.
        own = torch.from_dlpack(local) if local.numel() else torch.empty_like(local)
        # Without shape and stride, from_local assumes that all ranks have blocks of one size.
        return DTensor.from_local(
            own, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
        )

    def _parts(self, pieces: Iterable[Piece], start: int, stop: int) -> list[Tensor]:
        parts, end = [], start
        for piece in pieces:
            if piece.shard_start > end:
                parts.append(self._gap(piece.shard_start - end))
            parts.append(self.view_of(piece))
            end = piece.shard_stop
        if stop > end or not parts:
            parts.append(self._gap(stop - end))
        return parts

    def _within(self, start: int, stop: int) -> list[Piece]:
        return [piece for piece in self.pieces if start <= piece.shard_start and piece.shard_stop <= stop]

    def _gap(self, numel: int) -> Tensor:
        return torch.zeros(numel, dtype=self.dtype, device=self.device)


# The parameters of a shard, addressed as one 1-D tensor of ``layout.shard_numel`` elements, wherever they lie.
ShardParameters: TypeAlias = FlatParameters | PlacedParameters


def local_of(param: Tensor) -> Tensor:
    """Returns this rank's block of ``param`` without autograd history: the local tensor, or all of a plain tensor."""
    return local_tensor(param) if isinstance(param, DTensor) else param.detach()
