"""Swapping the average in for the parameters, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_asgd.replicated import Bucket

Backup = list[tuple[Bucket, Tensor]]  # with this rank's shard of the parameters, 1-D


@torch.no_grad()
def swap_in(buckets: Sequence[Bucket]) -> Backup:
    """Makes the parameters of ``buckets`` their averages. Collective.

    Buckets in which nothing averages yet cost nothing: there, the average is the parameter.
    """
    backup = []
    for bucket in buckets:
        if bucket.shard.average is not None:
            backup.append((bucket, bucket.shard.param.clone()))
            bucket.shard.copy_average_to_param_()
            bucket.start_gather()
    for bucket, _ in backup:
        bucket.wait()
    return backup


@torch.no_grad()
def swap_out(backup: Backup) -> None:
    """Makes the parameters exactly what they were before ``swap_in``. Collective."""
    for bucket, shard in backup:
        bucket.shard.param.copy_(shard)
        bucket.start_gather()
    for bucket, _ in backup:
        bucket.wait()
