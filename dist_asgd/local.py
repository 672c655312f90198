"""What a rank has of parameters that somebody else has placed, and of their gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

from dist_asgd.layout import BucketLayout, Piece
from dist_asgd.parameters import blocks_of
from dist_asgd.pieces import Placement, local_tensor


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


def is_placed(param: Tensor, gradients: str) -> bool:
    """Whether somebody else has placed it: a DTensor, a slice of FSDP1, which PyTorch marks, or what the user says."""
    return isinstance(param, DTensor) or getattr(param, "_fsdp_flattened", False) or gradients == "sharded"


def local_of(param: Tensor) -> Tensor:
    """What this rank has of the parameter, without a history."""
    return local_tensor(param) if isinstance(param, DTensor) else param.detach()


def local_gradient(param: Tensor) -> Tensor:
    """This rank's part of the gradient, which the parameter must have."""
    grad = param.grad
    if isinstance(grad, DTensor):
        local = local_tensor(grad)
        if isinstance(local, AsyncCollectiveTensor):
            local = grad._local_tensor = local.wait()
        return local
    return grad  # type: ignore[return-value]


def gradient_is_placed(param: Tensor) -> bool:
    """Whether the gradient, if there is one, has the mesh and the placements of the DTensor."""
    grad = param.grad
    if not (isinstance(grad, DTensor) and isinstance(param, DTensor)):
        return True
    return grad.placements == param.placements and grad.device_mesh == param.device_mesh


def place_gradient(param: Tensor) -> None:
    """Gives the gradient the placements of the parameter where it has others. Collective, then."""
    grad = param.grad
    if not gradient_is_placed(param) and isinstance(grad, DTensor) and isinstance(param, DTensor):
        with torch.no_grad():
            param.grad = grad.redistribute(param.device_mesh, param.placements)
