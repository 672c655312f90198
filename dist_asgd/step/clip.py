"""Clipping of all gradients by their common norm, for gradients that are sharded over the ranks."""

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
from dist_asgd.step.sync import StepAgreement
from dist_asgd.step.validation import Groups


def clip_(
    step_agreement: StepAgreement,
    groups: Groups,
    buckets: Sequence[Bucket],
    group: dist.ProcessGroup | None,
    max_norm: Any,
    norm_type: Any,
) -> Tensor:
    """Does the work of ``ShardedASGD.clip_grad_norm_``; returns the norm before clipping, 0-dim. Collective.

    Args:
        groups: ``optimizer.param_groups``.
        buckets: all buckets of the optimizer.
        group: the ranks of the optimizer; None for one rank.
        max_norm, norm_type: the user's arguments, not validated yet.

    Raises:
        ValueError: on every rank, for arguments out of range.
        RuntimeError: the same on every rank; see ``StepAgreement.agree_and_reduce``.
    """
    limit, order = _number(max_norm), _number(norm_type)
    operation = f"clip_grad_norm_(max_norm={limit}, norm_type={order})"
    whole = all(bucket.whole_gradients for bucket in buckets)
    if whole:
        step_agreement.agree_on(operation, groups, buckets)
    else:
        step_agreement.agree_and_reduce(operation, groups, buckets)
    # The ranks have met in one operation, so they have the same numbers: all of them raise here, or none.
    if not limit >= 0:
        raise ValueError(f"max_norm must be a number >= 0, got {max_norm!r}")
    if not order > 0:
        raise ValueError(f"norm_type must be a number > 0, got {norm_type!r}")
    if not whole:
        return clip_sharded_(buckets, limit, order, group)
    params = [param for of_group in groups for param in of_group["params"] if param.numel()]
    return nn.utils.clip_grad_norm_(params, limit, order)


def _number(value: Any) -> float:
    """Returns ``value`` as a float, like torch also from ``"inf"`` and 1-element tensors; NaN where it is no number."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several elements
        return math.nan


def clip_sharded_(
    buckets: Sequence[Bucket], max_norm: float, norm_type: float, group: dist.ProcessGroup | None
) -> Tensor:
    """Scales the gradients of ``buckets``, in place, as ``torch.nn.utils.clip_grad_norm_`` would if whole. Collective.

    Returns:
        0-dim tensor: the norm before clipping, in fp32 or in the widest dtype of the updates if that is wider.
    """
    owned = [grad for bucket in buckets for grad in bucket.owned_gradients()]
    device = next((bucket.device for bucket in buckets), torch.device("cpu"))
    dtypes = [compute_dtype(bucket.dtype).to_real() for bucket in buckets]
    dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
    total = total_norm(owned, norm_type, device, group).to(dtype)
    scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for grads in _by_device_and_dtype([grad for bucket in buckets for grad in bucket.gradient_tensors()]):
        foreach_mul_(grads, scale.to(grads[0].device))
    return total


def total_norm(
    tensors: Sequence[Tensor], norm_type: float, device: torch.device, group: dist.ProcessGroup | None
) -> Tensor:
    """Returns the norm of all elements of the ``tensors`` of all ranks: 0-dim, fp64, on ``device``. Collective."""
    # In fp64, so that the norm, once rounded to fp32, does not depend on where buckets and shards are cut.
    norms: list[Tensor] = []
    for alike in _by_device_and_dtype(tensors):
        double = torch.promote_types(alike[0].dtype, torch.float64)
        norms += [norm.to(device) for norm in foreach_norm(alike, norm_type, dtype=double)]
    own = torch.linalg.vector_norm(torch.stack(norms), norm_type) if norms else torch.zeros((), device=device).double()
    if group is None:
        return own
    # Every rank's norm is gathered: a maximum over ranks may lose a NaN, and a sum of powers may overflow.
    everyone = own.new_empty(dist.get_world_size(group))
    all_gather(everyone, own.view(1), group=group)
    return torch.linalg.vector_norm(everyone, norm_type)


def _by_device_and_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Groups the tensors that have elements by device and dtype, as multi-tensor operators need them."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in filter(Tensor.numel, tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(kinds.values())
