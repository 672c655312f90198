"""Updates a slice of a shard by the fastest code there is for its device and dtypes.

That is one pass over memory (kernels/cpu.py, kernels/gpu.py), or else PyTorch's operators, which on a CPU work on one
block after the other, so that a block stays in cache. Both give the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from dist_asgd.asgd.rounding import Rounding, compute_dtype
from dist_asgd.asgd.rule import low_precision_step_
from dist_asgd.asgd.schedule import DeviceScalars, Hyperparameters
from dist_asgd.c_library import warn_once
from dist_asgd.kernels.cpu import native_update
from dist_asgd.kernels.selfcheck import matches_operators
from dist_asgd.kernels.tensor_list import Gradients, SliceStep, TensorList, UpdateKind, as_real

# Elements, for each thread, of a block that CPU operators work on. Parameter, gradient, average and temporaries of a
# block (512 KiB each in fp32) stay in a core's cache between the operators, which is twice as fast as passes over whole
# tensors and gives the same bits. Smaller blocks lose more by starting operators; larger ones do not fit the cache.
BLOCK_PER_THREAD = 128 * 1024


class FusedUpdate(Protocol):
    """Updates several tensors that share ``scalars`` by one step, in one pass over memory."""

    takes_device_scalars: bool  # whether the scalars of a step may be DeviceScalars

    def __call__(self, parts: TensorList, grads: Gradients, step: SliceStep) -> None:
        """Updates ``parts``, and averages and masters, by ``grads``: one for each part, which are only read."""


def fused_update(
    device: torch.device,
    param: torch.dtype,
    grad: torch.dtype,
    average: torch.dtype | None,
    has_master: bool,
    rounding: Rounding,
) -> FusedUpdate | None:
    """Returns the one-pass update for real parameters of these dtypes on ``device``, or None if there is none.

    The first call with a combination of arguments compiles code and checks its bits.

    Args:
        average: the dtype of all averages, or None without an average.
    """
    dtype, form = compute_dtype(param), FORMS.get(device.type)
    if form is None or average not in (None, dtype) or grad not in (param, dtype):
        return None
    return form(device, UpdateKind(param, grad, has_master, rounding.dtype, rounding.seed is not None))


class Forms:
    """The one-pass updates of the parameters of a shard, wherever they lie. Each is looked up once.

    Args:
        device: where parameters, averages and masters lie.
        param, average: their dtypes, real or complex.
        has_master: whether there are masters.
        rounding: how a step rounds parameters.
    """

    def __init__(
        self, device: torch.device, param: torch.dtype, average: torch.dtype, has_master: bool, rounding: Rounding
    ) -> None:
        self._param, self._average = param.to_real(), average.to_real()
        self._device, self._has_master, self._rounding = device, has_master, rounding
        self._known: dict[tuple[torch.dtype, bool], FusedUpdate | None] = {}

    def of(self, grad: torch.dtype, averaged: bool = True) -> FusedUpdate | None:
        """Returns ``fused_update`` for gradients of a real dtype, in a step with averages or without."""
        key = grad, averaged
        if key not in self._known:
            average = self._average if averaged else None
            self._known[key] = fused_update(self._device, self._param, grad, average, self._has_master, self._rounding)
        return self._known[key]

    @property
    def fuse(self) -> bool:
        """Whether one kernel updates all parameters of the shard. The first look may compile it."""
        return self.of(self._param) is not None


@functools.cache
def _on_gpu(device: torch.device, kind: UpdateKind) -> FusedUpdate | None:
    from dist_asgd.kernels.gpu import triton_update  # here, since importing Triton takes as long as importing PyTorch

    update = triton_update(kind.param, kind.grad, kind.rounded)
    if update is None:
        warn_once("Triton is not installed, or has no update of these dtypes")
        return None
    try:
        works = matches_operators(update, device, kind)
    except Exception as error:  # of any type: no C compiler for Triton's launcher, an unknown GPU, ...
        warn_once(f"Triton's update does not run on {device}", repr(error))
        return None
    if not works:
        warn_once(f"Triton's update of {kind.param} differs from PyTorch's operators on {device}")
    return update if works else None


# For each device type, the function that makes its one-pass update.
FORMS: dict[str, Callable[..., FusedUpdate | None]] = {
    "cpu": lambda device, kind: native_update(kind),
    "cuda": _on_gpu,
}


def can_capture(
    device: torch.device, param: torch.dtype, average: torch.dtype, has_master: bool, rounding: Rounding
) -> bool:
    """Returns whether there is an update in one pass with ``DeviceScalars``, so that a CUDA graph can capture it.

    Args:
        param, average: the dtypes of parameters and averages, real or complex.
    """
    param = param.to_real()
    fused = fused_update(device, param, param, average.to_real(), has_master, rounding)
    if fused is None or not fused.takes_device_scalars:
        return False
    kind = UpdateKind(param, param, has_master, rounding.dtype, rounding.seed is not None)
    works = matches_operators(fused, device, kind, on_device=True)
    if not works:
        warn_once(f"Triton's update of {param} with scalars on {device} differs from PyTorch's operators")
    return works


def advance_(scalars: DeviceScalars, h: Hyperparameters) -> None:
    """Advances ``scalars``, in place and without waiting for the device, from one step to the next."""
    from dist_asgd.kernels import gpu_schedule  # here, since it imports Triton

    gpu_schedule.advance_(scalars, h)


class PartsSlice(NamedTuple):
    """An ``UpdateSlice`` of parameters that are updated where they lie. ``Forms.fuse`` must hold for them."""

    start: int  # index in the shard of the first element
    stop: int  # index in the shard after the last element
    parts: TensorList
    grads: Gradients  # one for each part, in the parts' dtype or in compute_dtype

    def update_(self, step: SliceStep, forms: Forms) -> None:
        """Updates the parameters, and the averages and the master of ``step``, in place.

        Args:
            step: its averages and master are the elements ``[start, stop)`` of the shard's, as reals. The ``first`` of
                its rounding is the number of the element at ``start``.
            forms: the updates of the shard.
        """
        fused = forms.of(self.grads.tensors[0].dtype, bool(step.averages))
        if fused is None:
            param = self.parts.tensors[0]
            raise RuntimeError(f"no update in one pass of {param.dtype} on {param.device}, and none else was prepared")
        fused(self.parts, self.grads, step)


class FlatSlice(NamedTuple):
    """An ``UpdateSlice`` whose parameters lie in one 1-D tensor, and its gradients in another."""

    start: int  # index in the shard of the first element
    param: Tensor  # 1-D, any floating or complex dtype; updated in place
    grad: Tensor  # 1-D, as long as param; only read

    @property
    def stop(self) -> int:
        return self.start + self.grad.numel()

    def update_(self, step: SliceStep, forms: Forms) -> None:
        """Updates like ``PartsSlice.update_``, with the bits of ``low_precision_step_``.

        Raises ``RuntimeError`` if scalars are on the device and there is no one-pass update of these dtypes.
        """
        param, grad = as_real(self.param), as_real(self.grad)
        fused = forms.of(grad.dtype, bool(step.averages))
        if fused is not None and grad.is_contiguous():
            fused(TensorList.of([param]), Gradients.of([grad]), step)
        else:
            update_blocks_(param, grad, step)


# A range of a shard, all of whose elements have equal scalars, that one call of ``update_`` updates.
UpdateSlice: TypeAlias = PartsSlice | FlatSlice


def update_blocks_(param: Tensor, grad: Tensor, step: SliceStep) -> None:
    """Updates 1-D real tensors by PyTorch's operators, block by block, as ``FlatSlice.update_`` does."""
    if isinstance(step.scalars, DeviceScalars):
        raise RuntimeError(f"no update in one pass of {param.dtype} with a gradient of {grad.dtype} on {param.device}")
    size = block_size(param.numel(), param.device)
    if param.numel() <= size:
        low_precision_step_(param, grad, step.averages, step.master, step.h, step.scalars, step.rounding)
        return
    params = param.split(size)  # one call: slicing block by block would cost as much as small operators
    averages = [average.split(size) for average in step.averages]
    masters = [None] * len(params) if step.master is None else step.master.split(size)
    for number, (block, grad_block, master) in enumerate(zip(params, grad.split(size), masters, strict=True)):
        own = replace(step.rounding, first=step.rounding.first + number * size)
        moving = [blocks[number] for blocks in averages]
        low_precision_step_(block, grad_block, moving, master, step.h, step.scalars, own)


def block_size(numel: int, device: torch.device) -> int:
    """Returns the number of elements of the blocks in which ``update_blocks_`` works on ``numel`` elements.

    On a CPU it is a multiple of 32, and all blocks but the last are equally long; elsewhere there is one block.
    """
    if device.type != "cpu":
        return max(numel, 1)
    count = max(1, round(numel / (BLOCK_PER_THREAD * torch.get_num_threads())))
    return max(32, -(-numel // (32 * count)) * 32)
