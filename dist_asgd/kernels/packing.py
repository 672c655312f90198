"""Packs gradients into the flat buffer in which they are sent, in another dtype, by one launch on a GPU.

PyTorch's ``cat`` joins tensors of its result's dtype by few launches; where it has to convert, it copies one after the
other, which takes the host some microseconds a parameter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from dist_asgd.c_library import warn_once
from dist_asgd.kernels.selfcheck import packing_matches_operators
from dist_asgd.kernels.tensor_list import Gradients, TensorList


class FusedPacking(Protocol):
    """Packs gradients of one dtype into a buffer of another."""

    def __call__(self, parts: TensorList, grads: Gradients, out: Tensor) -> None:
        """Writes gradient ``i``, rounded to the dtype of ``out`` (1-D), to the elements from ``parts.starts[i]`` on.

        A gradient whose address is 0 is missing. Its elements of ``out`` stay, and so do elements between gradients.
        On a GPU the addresses of gradients are sent to the device where they have changed since the last call.

        Args:
            parts: the parameters, which give the numbers of elements. Callers keep it from one call to the next.
            grads: one for each parameter, 1-D or of any shape that is contiguous.
            out: not shared with a gradient.
        """


@functools.cache
def _on_gpu(device: torch.device, grad: torch.dtype, wire: torch.dtype) -> FusedPacking | None:
    from dist_asgd.kernels.gpu_packing import triton_packing  # here, since importing Triton takes long

    pack = triton_packing(grad, wire)
    if pack is None:
        warn_once("Triton is not installed, or packs no gradients of these dtypes")
        return None
    try:
        works = packing_matches_operators(pack, device, grad, wire)
    except Exception as error:  # of any type: no C compiler for Triton's launcher, an unknown GPU, ...
        warn_once(f"Triton's packing of gradients does not run on {device}", repr(error))
        return None
    if not works:
        warn_once(f"Triton's packing of {grad} gradients differs from PyTorch's operators on {device}")
    return pack if works else None


# For each device type, the function that makes its packing for dtypes of gradients and of the buffer.
FORMS: dict[str, Callable[..., FusedPacking | None]] = {"cuda": _on_gpu}


def fused_packing(device: torch.device, grad: torch.dtype, wire: torch.dtype) -> FusedPacking | None:
    """Returns the packing by one kernel, or None where operators do it; they do it well between equal dtypes.

    The first call with a combination of arguments compiles code and checks its bits.
    """
    form = FORMS.get(device.type)
    return None if form is None or grad == wire else form(device, grad, wire)
