"""Clips the gradients by the norm of all of them together."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_asgd._torch_private import foreach_mul_, foreach_norm
from dist_asgd.asgd.rounding import compute_dtype
from dist_asgd.buckets.base import Bucket
from dist_asgd.comm.collectives import all_gather
from dist_asgd.step.sync import Settlement
from dist_asgd.step.validation import Groups


def clip_(
    settlement: Settlement,
    groups: Groups,
    buckets: Sequence[Bucket],
    arguments: tuple[Any, Any],
    group: dist.ProcessGroup | None,
    error: Exception | None,
) -> Tensor:
    """``ShardedASGD.clip_grad_norm_``, with its ``arguments``, for all ``buckets`` of its ``groups``. Collective.

    An ``error`` of this rank becomes that of all.
    """
    max_norm, norm_type, bad = clip_arguments(*arguments)
    error = error or bad
    operation = f"clip_grad_norm_({max_norm=}, {norm_type=})"  # which must be the same on every rank
    if all(bucket.whole_gradients for bucket in buckets):
        settlement.align(operation, buckets, error)
        params = [param for of_group in groups for param in of_group["params"] if param.numel()]
        return nn.utils.clip_grad_norm_(params, max_norm, norm_type)
    settlement.settle(operation, groups, buckets, error)
    return clip_sharded_(buckets, max_norm, norm_type, group)


def clip_arguments(max_norm: Any, norm_type: Any) -> tuple[float, float, Exception | None]:
    """The arguments of ``clip_grad_norm_`` as torch's takes them (``"inf"`` and tensors too), and the error in them."""
    limit, order = _number(max_norm), _number(norm_type)
    error = None
    if not order > 0:
        error = ValueError(f"norm_type must be a number > 0, got {norm_type!r}")
    if not limit >= 0:
        error = ValueError(f"max_norm must be a number >= 0, got {max_norm!r}")
    return limit, order, error


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # the last from tensors of several elements
        return math.nan


def clip_sharded_(
    buckets: Sequence[Bucket], max_norm: float, norm_type: float, group: dist.ProcessGroup | None
) -> Tensor:
    """Scales the gradients of ``buckets`` as ``torch.nn.utils.clip_grad_norm_`` does whole ones. Collective.

    Returns their norm, 0-dim, in the widest dtype that the rule is computed in, at least fp32.
    """
    owned = [grad for bucket in buckets for grad in bucket.owned_gradients()]
    device = next((bucket.device for bucket in buckets), torch.device("cpu"))
    dtypes = [compute_dtype(bucket.dtype).to_real() for bucket in buckets]
    dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
    total = total_norm(owned, norm_type, device, group).to(dtype)
    scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for grads in _of_one_kind([grad for bucket in buckets for grad in bucket.gradient_tensors()]):
        foreach_mul_(grads, scale.to(grads[0].device))
    return total


def total_norm(
    tensors: Sequence[Tensor], norm_type: float, device: torch.device, group: dist.ProcessGroup | None
) -> Tensor:
    """The norm (0-dim, fp64, on ``device``) of all elements of the ``tensors`` of every rank together. Collective."""
    # In double throughout: where buckets and shards are cut then does not show in a norm that is rounded to fp32.
    norms: list[Tensor] = []
    for alike in _of_one_kind(tensors):
        double = torch.promote_types(alike[0].dtype, torch.float64)
        norms += [norm.to(device) for norm in foreach_norm(alike, norm_type, dtype=double)]
    own = torch.linalg.vector_norm(torch.stack(norms), norm_type) if norms else torch.zeros((), device=device).double()
    if group is None:
        return own
    # All of them, not their maximum or their sum: a maximum over ranks may lose a NaN, powers may overflow.
    everyone = own.new_empty(dist.get_world_size(group))
    all_gather(everyone, own.view(1), group=group)
    return torch.linalg.vector_norm(everyone, norm_type)


def _of_one_kind(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Apart by device and dtype: the multi-tensor operators take one."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in filter(Tensor.numel, tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(kinds.values())
