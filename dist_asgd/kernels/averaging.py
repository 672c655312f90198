"""Moves averages towards parameters in one pass over memory, for averages beside an optimizer that knows none.

That is kernels/averaging.c on a CPU, a Triton kernel on a GPU, or else PyTorch's operators in blocks that stay in
cache. All give the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dist_asgd.asgd.rule import average_step_
from dist_asgd.c_library import warn_once
from dist_asgd.kernels.cpu import native_averaging
from dist_asgd.kernels.dispatch import block_size
from dist_asgd.kernels.selfcheck import averages_match_operators
from dist_asgd.kernels.tensor_list import TensorList


class FusedAveraging(Protocol):
    """Moves averages of one dtype in one pass over memory."""

    def __call__(self, parts: TensorList, averages: Sequence[Tensor], mus: Sequence[float]) -> None:
        """Does what ``move_averages_`` does, for at least one element and one average, and no ``mu`` of 0."""


def move_averages_(parts: TensorList, averages: Sequence[Tensor], mus: Sequence[float]) -> None:
    """Moves every average in place towards the parameters by its ``mu``, as ``average_step_`` does.

    The first call with a pair of dtypes compiles code and checks its bits. On a GPU the addresses of several parts are
    sent to the device once for each ``parts`` object, so callers keep it from one call to the next.

    Args:
        parts: the parameters, of any shape, only read; fp32, fp64, bf16 or fp16.
        averages: each 1-D and contiguous, fp32 or fp64, no narrower than the parameters and on their device. Element
            ``parts.starts[i] + j`` belongs to element ``j`` of part ``i``; other elements stay as they are.
        mus: one for each average. An average whose ``mu`` is 0 is neither read nor written.
    """
    moving = [(average, mu) for average, mu in zip(averages, mus, strict=True) if mu != 0]
    if not moving or not parts.numel:
        return
    param, dtypes = parts.tensors[0], {average.dtype for average, _ in moving}
    form = FORMS.get(param.device.type) if len(dtypes) == 1 else None
    fused = None if form is None else form(param.device, param.dtype, *dtypes)
    if fused is None:
        _move_by_operators(parts, moving)
    else:
        fused(parts, *zip(*moving, strict=True))


@functools.cache
def _on_gpu(device: torch.device, param: torch.dtype, average: torch.dtype) -> FusedAveraging | None:
    # Here, since importing Triton takes as long as importing PyTorch.
    from dist_asgd.kernels.gpu_averaging import triton_averaging

    move = triton_averaging(param, average)
    if move is None:
        warn_once("Triton is not installed, or has no pass for averages of these dtypes")
        return None
    try:
        works = averages_match_operators(move, device, param, average)
    except Exception as error:  # of any type: no C compiler for Triton's launcher, an unknown GPU, ...
        warn_once(f"Triton's pass for averages does not run on {device}", repr(error))
        return None
    if not works:
        warn_once(f"Triton's pass for averages of {param} differs from PyTorch's operators on {device}")
    return move if works else None


# For each device type, the function that makes its pass for dtypes of parameters and averages.
FORMS: dict[str, Callable[..., FusedAveraging | None]] = {
    "cpu": lambda device, param, average: native_averaging(param, average),
    "cuda": _on_gpu,
}


@torch.no_grad()
def _move_by_operators(parts: TensorList, moving: Sequence[tuple[Tensor, float]]) -> None:
    for part, start in zip(parts.tensors, parts.starts, strict=True):
        size = block_size(part.numel(), part.device)
        for number, block in enumerate(part.view(-1).split(size)):
            first = start + number * size
            for average, mu in moving:
                average_step_(average[first : first + len(block)], block, mu)
