"""Applies the rule to flat slices, in the form that suits the device and the dtypes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dist_asgd.rule import Hyperparameters, Scalars, asgd_step_, asgd_steps_, average_step_

# CPU operators are walked in blocks of about this many elements for each thread: parameter, gradient, average and
# temporaries of a block (512 KiB each in fp32) stay in a core's cache between the operators, which is twice as fast as
# passes over whole tensors and has the same bits. Smaller blocks lose more by starting operators, larger ones leave the
# cache.
BLOCK_PER_THREAD = 128 * 1024


def block_size(numel: int, device: torch.device) -> int:
    """Elements of each of the even blocks, a multiple of 32, in which ``numel`` elements are walked."""
    if device.type != "cpu":
        return max(numel, 1)
    count = max(1, round(numel / (BLOCK_PER_THREAD * torch.get_num_threads())))
    return max(32, -(-numel // (32 * count)) * 32)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the rule is computed: the parameter's, but at least fp32 precision."""
    return torch.promote_types(dtype, torch.float32)


def update_(
    param: Tensor,  # 1-D, any floating or complex dtype; updated in place
    grad: Tensor,  # 1-D, same length; only read
    average: Tensor | None,  # 1-D, same length; updated in place. None where the average still is the parameter
    master: Tensor | None,  # 1-D, same length, in compute_dtype; updated in place. None for no master
    h: Hyperparameters,
    scalars: Scalars,
) -> None:
    """One step of one slice whose elements share ``scalars``.

    With a ``master``, the rule runs on it and ``param`` becomes its rounding; a master whose rounding no longer is the
    parameter (somebody wrote the parameter) first takes the parameter's value. A low-precision parameter without a
    master is updated in fp32 and rounded once.
    """
    param, grad = as_real(param), as_real(grad)
    average = None if average is None else as_real(average)
    master = None if master is None else as_real(master)
    dtype = compute_dtype(param.dtype)
    size = block_size(param.numel(), param.device)
    if param.numel() <= size:
        _update_block_(param, grad, average, master, dtype, h, scalars)
        return
    params = param.split(size)  # all at once: a slice costs as much as a small operator
    averages = [None] * len(params) if average is None else average.split(size)
    masters = [None] * len(params) if master is None else master.split(size)
    for blocks in zip(params, grad.split(size), averages, masters, strict=True):
        _update_block_(*blocks, dtype, h, scalars)


def update_many_(
    params: list[Tensor],  # any shapes, one real dtype of at least fp32 precision; updated in place
    flats: list[Tensor],  # the same as 1-D
    grads: list[Tensor],  # same shapes and dtype; only read
    average: Tensor | None,  # 1-D, as joined() makes it of the parameters; updated in place
    joined: Callable[[], Tensor],
    h: Hyperparameters,
    scalars: Scalars,
) -> None:
    """One step of several parameters that share ``scalars``; each stays where it is."""
    asgd_steps_(params, flats, grads, h, scalars)
    if average is not None:
        average_step_(average, joined(), scalars.mu, spent=True)


def followed(master: Tensor, param: Tensor, out: Tensor | None = None) -> Tensor:
    """``master``, but ``param`` where that no longer is its rounding."""
    return torch.where(master.to(param.dtype) == param, master, param.to(master.dtype), out=out)


def _update_block_(
    param: Tensor,
    grad: Tensor,
    average: Tensor | None,
    master: Tensor | None,
    dtype: torch.dtype,
    h: Hyperparameters,
    scalars: Scalars,
) -> None:
    work = param.to(dtype) if master is None else followed(master, param, out=master)
    asgd_step_(work, grad.to(dtype), average, h, scalars)
    if work is not param:
        param.copy_(work)


def as_real(flat: Tensor) -> Tensor:
    """Complex numbers are pairs of reals to the rule, as in torch.optim."""
    return torch.view_as_real(flat).view(-1) if flat.is_complex() else flat
