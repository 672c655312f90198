"""Compares gradients between ranks: those that somebody else must have averaged, and slices that must differ."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_asgd._torch_private import is_fsdp1_slice
from dist_asgd.buckets.base import Bucket
from dist_asgd.buckets.local_tensors import local_gradient
from dist_asgd.buckets.replicas import sum_and_norm
from dist_asgd.sharding.shard_views import local_of

SAMPLED = 8  # gradients of a bucket

# Name, weighted sum and 2-norm of a gradient; the first of the ranks that must have it, None if nobody else must.
Sample = tuple[str, float, float, int | None]


def gradient_sample(buckets: Sequence[Bucket]) -> list[Sample]:
    """Gradients that nothing but the user makes equal, or different, on ranks.

    A few of plain parameters, and of FSDP1's slices with their parameters. All of DTensors on several meshes: each of
    those may be another parameter.
    """
    found: list[tuple[str, Tensor, int | None]] = []
    for bucket in buckets:
        own = [
            (name, param)
            for name, param in zip(bucket.names, bucket.params, strict=True)
            if param.grad is not None and local_of(param).numel()
        ]
        if bucket.mirrors:
            few = own if isinstance(bucket.params[0], DTensor) else own[:SAMPLED]
            found += [(name, local_gradient(param), bucket.mirrors[0]) for name, param in few]
        for name, param in own[:SAMPLED] if bucket.uneven else []:
            if is_fsdp1_slice(param):
                found += [(name, local_gradient(param), None), (name, param.detach(), None)]
    if not found:
        return []
    values = torch.stack([sum_and_norm(tensor).cpu() for _, tensor, _ in found]).tolist()
    return [(name, total, norm, owner) for (name, _, owner), (total, norm) in zip(found, values, strict=True)]


def require_same_gradients(everyone: Sequence[Sequence[Sample]]) -> bool:
    """Raises ``RuntimeError`` where one gradient differs on ranks by more than rounding, or slices do not.

    Gradients of different data have sums that differ about as much as their norm. Returns whether all that was compared
    told something: was finite and not zero.
    """
    _require_different_slices(everyone)
    firsts = [{name: (total, norm) for name, total, norm, _ in sample} for sample in everyone]
    for rank, sample in enumerate(everyone):
        for name, total, norm, owner in sample:
            if owner is None:
                continue
            first, first_norm = firsts[owner].get(name, (total, norm))
            if abs(total - first) > 0.01 * max(norm, first_norm):  # False where one is not finite
                raise RuntimeError(
                    f"the gradient of parameter {name!r} differs between ranks (norm {first_norm:.6g} on rank "
                    f"{owner}, {norm:.6g} on rank {rank}), and it should have been averaged. A plain parameter with "
                    "gradients='reduced': wrap the model in DistributedDataParallel and leave no_sync() for the last "
                    "backward, or pass gradients='local'. A DTensor on a mesh of some of the ranks: fully_shard the "
                    "model over the others, or, if it is another parameter there, build an optimizer for each mesh "
                    "(process_group=mesh.get_group())"
                )
    return all(0 < norm < math.inf for sample in everyone for _, _, norm, owner in sample if owner is not None)


def _require_different_slices(everyone: Sequence[Sequence[Sample]]) -> None:
    seen: dict[tuple[Sample, ...], int] = {}
    for rank, sample in enumerate(everyone):
        slices = tuple(entry for entry in sample if entry[3] is None)
        first = seen.setdefault(slices, rank)
        if first != rank and any(norm > 0 for _, _, norm, _ in slices):
            raise RuntimeError(
                f"rank {first} and rank {rank} have the same gradient of parameter {slices[0][0]!r}, which should be "
                "another slice on each rank. With FSDP's NO_SHARD use DistributedDataParallel and gradients='reduced'; "
                "with HYBRID_SHARD pass process_group= the ranks that hold different slices"
            )
