"""Whole tensors to DTensors and back, by plain slices and one collective call a mesh dimension.

DTensor's own ways take about a millisecond of Python each, and tests compare every parameter after many steps.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

Placements = tuple[Placement, ...]


def distribute(value: Tensor, like: DTensor) -> DTensor:
    """Returns `value`, whole on every rank, as a DTensor with the mesh and the placements of `like`."""
    mesh, placements = like.device_mesh, like.placements
    if not _are_plain(placements):
        return distribute_tensor(value, mesh, placements, src_data_rank=None)
    piece = _piece(value, mesh, placements).clone(memory_format=torch.contiguous_format)
    placed: Any = DTensor.from_local(piece, mesh, placements, run_check=False, shape=value.shape, stride=value.stride())
    return placed


def gather(tensor: DTensor) -> Tensor:
    """Returns the whole tensor, of its own memory, on every rank of its mesh. Collective on that mesh."""
    mesh, placements = tensor.device_mesh, tensor.placements
    if not _are_plain(placements):
        return tensor.full_tensor().detach().clone()
    piece = tensor.to_local().detach()
    whole = torch.zeros(tensor.shape, dtype=piece.dtype, device=piece.device)
    _piece(whole, mesh, placements).copy_(piece)
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard) and whole.numel():
            # Bytes, since each is 0 on all ranks but one; floating-point sums would lose the sign of -0.
            dist.all_reduce(whole.view(-1).view(torch.uint8), group=mesh.get_group(dim))
    return whole


def _are_plain(placements: Placements) -> bool:
    """Whether ranks hold slices as torch.chunk() cuts them, one mesh dimension after the other."""
    return all(type(placement) in (Replicate, Shard) for placement in placements)


def _piece(whole: Tensor, mesh: DeviceMesh, placements: Placements) -> Tensor:
    """Returns the view of `whole` that this rank holds."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "this rank is not in the mesh"
    for at, size, placement in zip(coordinate, mesh.shape, placements, strict=True):
        if isinstance(placement, Shard):
            length = whole.shape[placement.dim]
            chunk = -(-length // size)
            start = min(at * chunk, length)
            whole = whole.narrow(placement.dim, start, min(chunk, length - start))
    return whole
