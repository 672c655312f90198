"""Swapping the average in for the parameters, and back."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from dist_asgd.replicated import Bucket


@torch.no_grad()
def swap_in(buckets: Sequence[Bucket]) -> list[Bucket]:
    """Makes the parameters of ``buckets`` their averages, and returns those for which that meant something. Collective.

    Each rank keeps its shard of the parameters: 1/N of their memory. Buckets in which nothing averages yet cost
    nothing: there, the average is the parameter.
    """
    swapped = []
    for bucket in buckets:
        average = bucket.shard.average
        if average is not None:
            bucket.shard.swap_in(average)
            bucket.start_gather()
            swapped.append(bucket)
    for bucket in swapped:
        bucket.wait()
    return swapped


@torch.no_grad()
def swap_out(swapped: Sequence[Bucket], patience: float | None) -> None:
    """Makes the parameters exactly what they were before ``swap_in``. Collective.

    Args:
        patience: seconds to wait for the other ranks; None for ever. What they have not sent by then is waited for
            before the parameters are used by the optimizer again.
    """
    deadline = None if patience is None else time.monotonic() + patience
    for bucket in swapped:
        bucket.shard.swap_out()
        bucket.start_gather()
    for bucket in swapped:
        bucket.wait(None if deadline is None else deadline - time.monotonic())
