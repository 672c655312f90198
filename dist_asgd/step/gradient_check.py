"""Comparison of gradients between ranks in the first steps: averaged ones must be equal, slices must differ.

The optimizer averages only the gradients of plain parameters with ``gradients="local"``. Where DistributedDataParallel,
FSDP or tensor parallelism has to, nothing else would notice that it did not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_asgd._torch_private import is_fsdp1_slice
from dist_asgd.buckets.base import Bucket
from dist_asgd.buckets.local_tensors import local_gradient
from dist_asgd.kernels.tensor_list import as_real
from dist_asgd.sharding.shard_views import local_of

CHUNK = 2**22  # elements of a gradient that are summed up at once
SAMPLED = 8  # number of gradients of a bucket that are compared at most

# (name of the parameter, weighted sum and 2-norm of the tensor, owner). The owner is the first rank of the ranks that
# must have the same tensor; None for a slice, which no other rank may have.
Sample = tuple[str, float, float, int | None]


def gradient_sample(buckets: Sequence[Bucket]) -> list[Sample]:
    """Returns samples of this rank's gradients that only the user's setup makes equal, or different, on the ranks.

    A bucket of plain parameters or of FSDP1's slices gives at most ``SAMPLED`` gradients; slices also give the values
    of their parameters. DTensors that ranks of several meshes share give all gradients, because any of them may be
    different parameters that have one name.
    """
    found: list[tuple[str, Tensor, int | None]] = []
    for bucket in buckets:
        own = [
            (name, param)
            for name, param in zip(bucket.names, bucket.params, strict=True)
            if param.grad is not None and local_of(param).numel()
        ]
        if bucket.compared_ranks:
            few = own if isinstance(bucket.params[0], DTensor) else own[:SAMPLED]
            found += [(name, local_gradient(param), bucket.compared_ranks[0]) for name, param in few]
        for name, param in own[:SAMPLED] if bucket.presharded else []:
            if is_fsdp1_slice(param):
                found += [(name, local_gradient(param), None), (name, param.detach(), None)]
    if not found:
        return []
    values = torch.stack([_sum_and_norm(tensor).cpu() for _, tensor, _ in found]).tolist()
    return [(name, total, norm, owner) for (name, _, owner), (total, norm) in zip(found, values, strict=True)]


def require_same_gradients(everyone: Sequence[Sequence[Sample]]) -> bool:
    """Raises ``RuntimeError`` where a gradient differs between ranks by more than rounding, or where slices are equal.

    Gradients of different data have weighted sums that differ about as much as their norms.

    Args:
        everyone: the result of ``gradient_sample`` on each rank, by rank.

    Returns:
        Whether every gradient was finite and not zero, so that the comparison proves something.
    """
    _require_different_slices(everyone)
    firsts = [{name: (total, norm) for name, total, norm, _ in sample} for sample in everyone]
    for rank, sample in enumerate(everyone):
        for name, total, norm, owner in sample:
            if owner is None:
                continue
            first, first_norm = firsts[owner].get(name, (total, norm))
            if abs(total - first) > 0.01 * max(norm, first_norm):  # False for a sum or norm that is not finite
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


def _sum_and_norm(tensor: Tensor) -> Tensor:
    """Returns a weighted sum and the 2-norm of the elements of ``tensor``: 1-D, 2 elements, fp64, on its device.

    Two tensors for which they differ have different values. No two elements have one weight, because the plain sum says
    nothing about the gradients of a softmax, which add up to zero. The fp64 copies are of ``CHUNK`` elements each.
    """
    flat = as_real(tensor.detach().flatten().resolve_conj())
    if not flat.numel():
        return torch.zeros(2, dtype=torch.float64, device=flat.device)
    found = []
    for number, chunk in enumerate(flat.split(CHUNK)):
        wide = chunk.double()
        places = torch.arange(number * CHUNK, number * CHUNK + len(wide), dtype=wide.dtype, device=wide.device)
        found.append(torch.stack([places.div_(len(flat)).add_(0.5) @ wide, wide.norm()]))
    sums, norms = torch.stack(found).unbind(1)
    return torch.stack([sums.sum(), norms.norm()])
