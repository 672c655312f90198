"""This rank's blocks of DTensors and slices, and of their gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_asgd._torch_private import AsyncCollectiveTensor, is_fsdp1_slice, local_tensor, set_local_tensor


def is_placed(param: Tensor, gradients: str) -> bool:
    """Whether ``param`` is sharded already: a DTensor, a slice of FSDP1, or any one with ``gradients="sharded"``."""
    return isinstance(param, DTensor) or is_fsdp1_slice(param) or gradients == "sharded"


def local_gradient(param: Tensor) -> Tensor:
    """Returns this rank's block of the gradient of ``param``, which must have one; waits for an asynchronous one."""
    grad = param.grad
    if isinstance(grad, DTensor):
        local = local_tensor(grad)
        if isinstance(local, AsyncCollectiveTensor):
            local = local.wait()
            set_local_tensor(grad, local)
        return local
    return grad  # type: ignore[return-value]


def gradient_is_placed(param: Tensor) -> bool:
    """Whether the gradient of a DTensor has the mesh and the placements of the DTensor; True without a gradient."""
    grad = param.grad
    if not (isinstance(grad, DTensor) and isinstance(param, DTensor)):
        return True
    return grad.placements == param.placements and grad.device_mesh == param.device_mesh


def place_gradient(param: Tensor) -> None:
    """Redistributes the gradient to the placements of ``param``. Collective where it has others."""
    grad = param.grad
    if not gradient_is_placed(param) and isinstance(grad, DTensor) and isinstance(param, DTensor):
        with torch.no_grad():
            param.grad = grad.redistribute(param.device_mesh, param.placements)
