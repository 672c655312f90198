"""One step of a slice of a shard, in the form that suits the device and the dtypes.

One pass over memory where there is one (cpu.py for CPUs, kernels/gpu.py for GPUs); else PyTorch's operators, which on a
CPU walk blocks that stay in cache. Both have the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_asgd.asgd.rounding import Rounding, compute_dtype
from dist_asgd.asgd.rule import low_precision_step_
from dist_asgd.asgd.schedule import AnyScalars, DeviceScalars, Hyperparameters, Scalars
from dist_asgd.kernels.cpu import native_update
from dist_asgd.kernels.selfcheck import has_the_bits, say_once
from dist_asgd.kernels.tensor_list import Gradients, TensorList, as_real

# CPU operators are walked in blocks of about this many elements for each thread: parameter, gradient, average and
# temporaries of a block (512 KiB each in fp32) stay in a core's cache between the operators, which is twice as fast as
# passes over whole tensors and has the same bits. Smaller blocks lose more by starting operators, larger ones leave the
# cache.
BLOCK_PER_THREAD = 128 * 1024


# An average beside the first takes iterates by PyTorch's operators, in blocks of so many bytes: they stay in cache from
# one operator to the next, and temporaries are no larger.
PASS_BYTES = {"cpu": 2**20, "others": 2**24}


class FusedUpdate(Protocol):
    """One step of several parts, which share ``scalars``, in one pass."""

    takes_device_scalars: bool

    def __call__(
        self,
        parts: TensorList,  # updated in place
        grads: Gradients,  # of each part
        average: Tensor | None,  # 1-D, in compute_dtype, indexed by parts.starts; updated in place
        master: Tensor | None,  # the same
        h: Hyperparameters,
        scalars: Any,  # Scalars, or DeviceScalars if it takes them
        rounding: Rounding,  # of the element whose place in parts.starts is 0
    ) -> None: ...


def fused_update(
    device: torch.device,
    param: torch.dtype,
    grad: torch.dtype,
    average: torch.dtype | None,
    has_master: bool,
    rounding: Rounding,
) -> FusedUpdate | None:
    """For these dtypes, of real numbers; None where there is none. ``average`` None: no average."""
    dtype = compute_dtype(param)
    if average not in (None, dtype) or grad not in (param, dtype):
        return None
    if device.type not in FORMS:
        return None
    return FORMS[device.type](device, param, grad, has_master, rounding.dtype, rounding.seed is not None)


def _on_cpu(
    device: torch.device,
    param: torch.dtype,
    grad: torch.dtype,
    has_master: bool,
    rounded: torch.dtype,
    stochastic: bool,
) -> FusedUpdate | None:
    return native_update(param, grad, has_master, rounded, stochastic)


@functools.cache
def _on_gpu(
    device: torch.device,
    param: torch.dtype,
    grad: torch.dtype,
    has_master: bool,
    rounded: torch.dtype,
    stochastic: bool,
) -> FusedUpdate | None:
    from dist_asgd.kernels.gpu import triton_update  # here, since importing Triton takes as long as importing PyTorch

    update = triton_update(param, grad, rounded)
    if update is None:
        say_once("Triton is not installed, or has no update of these dtypes")
        return None
    rounding = Rounding(rounded, 1234 if stochastic else None, 5)
    try:
        works = has_the_bits(update, device, param, grad, has_master, rounding)
    except Exception as error:  # of many kinds: no C compiler for its launcher, a GPU that it does not know
        say_once(f"Triton's update does not run on {device}", repr(error))
        return None
    if not works:
        say_once(f"Triton's update of {param} differs from PyTorch's operators on {device}")
    return update if works else None


# By type of device.
FORMS: dict[str, Callable[..., FusedUpdate | None]] = {"cpu": _on_cpu, "cuda": _on_gpu}


def can_fuse(
    device: torch.device, param: torch.dtype, average: torch.dtype, has_master: bool, rounding: Rounding
) -> bool:
    """Whether parameters of a dtype, which may be complex, are updated in one pass wherever they lie."""
    return fused_update(device, param.to_real(), param.to_real(), average.to_real(), has_master, rounding) is not None


def can_capture(
    device: torch.device, param: torch.dtype, average: torch.dtype, has_master: bool, rounding: Rounding
) -> bool:
    """Whether they are so with ``DeviceScalars``, and with the bits of PyTorch's operators."""
    probed = Rounding(rounding.dtype, None if rounding.seed is None else 1234, 5)
    return _captures(device, param.to_real(), average.to_real(), has_master, probed)


@functools.cache
def _captures(
    device: torch.device, param: torch.dtype, average: torch.dtype, has_master: bool, rounding: Rounding
) -> bool:
    fused = fused_update(device, param, param, average, has_master, rounding)
    if fused is None or not fused.takes_device_scalars:
        return False
    works = has_the_bits(fused, device, param, param, has_master, rounding, on_device=True)
    if not works:
        say_once(f"Triton's update of {param} with scalars on {device} differs from PyTorch's operators")
    return works


def advance_(scalars: DeviceScalars, h: Hyperparameters) -> None:
    """After a step with ``scalars``, which become those of the next one."""
    from dist_asgd.kernels import gpu_schedule  # here, since it imports Triton

    gpu_schedule.advance_(scalars, h)


class UpdateSlice(Protocol):
    """What one call updates: neighbours in the shard with equal scalars."""

    @property
    def start(self) -> int:
        """In the shard."""

    @property
    def stop(self) -> int: ...

    def update_(
        self,
        average: Tensor | None,
        master: Tensor | None,
        h: Hyperparameters,
        scalars: AnyScalars,
        rounding: Rounding,
    ) -> None:
        """One step; ``average`` and ``master`` are those of ``[start, stop)``, 1-D, and are updated as well.

        ``rounding`` is that of the element at ``start``.
        """


@dataclass(frozen=True, slots=True)
class PartsSlice:
    """An ``UpdateSlice`` of parts that stay where they lie. ``can_fuse`` must hold for them."""

    start: int
    stop: int
    parts: TensorList
    grads: Gradients  # of each part, in the parts' dtype or compute_dtype

    def update_(
        self,
        average: Tensor | None,
        master: Tensor | None,
        h: Hyperparameters,
        scalars: AnyScalars,
        rounding: Rounding,
    ) -> None:
        average = None if average is None else as_real(average)
        master = None if master is None else as_real(master)
        param, grad = self.parts.tensors[0], self.grads.tensors[0]
        average_dtype = None if average is None else average.dtype
        fused = fused_update(param.device, param.dtype, grad.dtype, average_dtype, master is not None, rounding)
        if fused is None:
            raise RuntimeError(f"no update in one pass of {param.dtype} on {param.device}, and none else was prepared")
        fused(self.parts, self.grads, average, master, h, scalars, rounding)


@dataclass(frozen=True, slots=True)
class FlatSlice:
    """An ``UpdateSlice`` whose parameters and gradients lie in one 1-D tensor each."""

    start: int
    param: Tensor  # any floating or complex dtype; updated in place
    grad: Tensor  # only read

    @property
    def stop(self) -> int:
        return self.start + self.grad.numel()

    def update_(
        self,
        average: Tensor | None,
        master: Tensor | None,
        h: Hyperparameters,
        scalars: AnyScalars,
        rounding: Rounding,
    ) -> None:
        update_(self.param, self.grad, average, master, h, scalars, rounding)


def update_(
    param: Tensor,  # 1-D, any floating or complex dtype; updated in place
    grad: Tensor,  # 1-D, same length; only read
    average: Tensor | None,  # 1-D, same length; updated in place. None where the average still is the parameter
    master: Tensor | None,  # 1-D, same length, in compute_dtype; updated in place. None for no master
    h: Hyperparameters,
    scalars: AnyScalars,
    rounding: Rounding,
) -> None:
    """One step of one slice whose elements share ``scalars``; masters and low precision as in low_precision_step_."""
    param, grad = as_real(param), as_real(grad)
    average = None if average is None else as_real(average)
    master = None if master is None else as_real(master)
    average_dtype = None if average is None else average.dtype
    fused = fused_update(param.device, param.dtype, grad.dtype, average_dtype, master is not None, rounding)
    if fused is not None and grad.is_contiguous():
        fused(TensorList.of([param]), Gradients.of([grad]), average, master, h, scalars, rounding)
    elif isinstance(scalars, DeviceScalars):
        raise RuntimeError(f"no update in one pass of {param.dtype} with a gradient of {grad.dtype} on {param.device}")
    else:
        update_blocks_(param, grad, average, master, h, scalars, rounding)


def update_blocks_(
    param: Tensor,
    grad: Tensor,
    average: Tensor | None,
    master: Tensor | None,
    h: Hyperparameters,
    scalars: Scalars,
    rounding: Rounding,
) -> None:
    """The same by PyTorch's operators, of real numbers."""
    size = block_size(param.numel(), param.device)
    if param.numel() <= size:
        low_precision_step_(param, grad, average, master, h, scalars, rounding)
        return
    params = param.split(size)  # all at once: a slice costs as much as a small operator
    averages = [None] * len(params) if average is None else average.split(size)
    masters = [None] * len(params) if master is None else master.split(size)
    for number, blocks in enumerate(zip(params, grad.split(size), averages, masters, strict=True)):
        own = replace(rounding, first=rounding.first + number * size)
        low_precision_step_(*blocks, h, scalars, own)


def block_size(numel: int, device: torch.device) -> int:
    """Elements of each of the even blocks, a multiple of 32, in which ``numel`` elements are walked."""
    if device.type != "cpu":
        return max(numel, 1)
    count = max(1, round(numel / (BLOCK_PER_THREAD * torch.get_num_threads())))
    return max(32, -(-numel // (32 * count)) * 32)
