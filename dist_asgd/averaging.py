"""Swapping the average in for the parameters, and back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from dist_asgd.buckets import Bucket


@contextlib.contextmanager
def averages_swapped_in(buckets: Sequence[Bucket], patience: float) -> Iterator[None]:
    """Inside, the parameters of ``buckets`` are their averages; after it, exactly what they were before. Collective.

    Each rank keeps its shard of the parameters: 1/N of their memory. Buckets in which nothing averages yet cost
    nothing: there, the average is the parameter.

    Args:
        patience: seconds to wait for the other ranks where the block raised. What they have not sent by then is waited
            for before the parameters are used by the optimizer again.
    """
    averaging = [bucket for bucket in buckets if bucket.shard.averages]
    to_swap, to_restore = list(averaging), list(averaging)
    seconds: float | None = patience
    try:
        _each(to_swap, lambda bucket: bucket.shard.swap_in())
        _wait(averaging, None)
        yield
        seconds = None
    finally:
        try:
            _restore(to_swap, to_restore)
        except BaseException:  # KeyboardInterrupt
            _restore(to_swap, to_restore)
            raise
        _wait(averaging, seconds)


def _restore(to_swap: list[Bucket], to_restore: list[Bucket]) -> None:
    """May be called again where it was interrupted: both lists hold what is still to do."""
    _each(to_swap, lambda bucket: bucket.shard.swap_out())  # the other ranks expect their all-gathers
    _each(to_restore, lambda bucket: bucket.shard.swap_out())


@torch.no_grad()
def _each(to_do: list[Bucket], change: Callable[[Bucket], None]) -> None:
    """Changes the shards of ``to_do`` and starts their all-gathers; the list loses what is done."""
    while to_do:
        to_do[0].wait()  # an all-gather that is under way would overwrite the change
        change(to_do[0])
        to_do[0].start_gather(exact=True)
        del to_do[0]


def _wait(buckets: Sequence[Bucket], seconds: float | None) -> None:
    """For all together no longer than ``seconds``."""
    deadline = None if seconds is None else time.monotonic() + seconds
    for bucket in buckets:
        bucket.wait(None if deadline is None else deadline - time.monotonic())
