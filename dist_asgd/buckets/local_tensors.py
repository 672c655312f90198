"""What a rank has of parameters that somebody else has placed, and of their gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_asgd._torch_private import AsyncCollectiveTensor, is_fsdp1_slice, local_tensor, set_local_tensor


def is_placed(param: Tensor, gradients: str) -> bool:
    """Whether somebody else has placed it: a DTensor, a slice of FSDP1, which PyTorch marks, or what the user says."""
    return isinstance(param, DTensor) or is_fsdp1_slice(param) or gradients == "sharded"


def local_gradient(param: Tensor) -> Tensor:
    """This rank's part of the gradient, which the parameter must have."""
    grad = param.grad
    if isinstance(grad, DTensor):
        local = local_tensor(grad)
        if isinstance(local, AsyncCollectiveTensor):
            local = local.wait()
            set_local_tensor(grad, local)
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
