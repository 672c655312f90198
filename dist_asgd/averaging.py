"""Swapping the average in for the parameters, and back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from dist_asgd.agreement import Agreement
from dist_asgd.averages import Average, suffix_of
from dist_asgd.buckets import Bucket
from dist_asgd.parallel import ParallelModules
from dist_asgd.reducer import PATIENCE
from dist_asgd.settlement import Settlement

Groups = Sequence[dict[str, Any]]  # optimizer.param_groups


def start_averaging(groups: Groups, buckets: Sequence[Sequence[Bucket]]) -> None:
    """Sets ``t0`` of each of the ``groups`` to the steps that its ``buckets`` have taken."""
    for group, of_group in zip(groups, buckets, strict=True):
        steps = [run.scalars.read().step for bucket in of_group for run in bucket.shard.runs]
        group["t0"] = float(max(steps, default=0))
        group |= {"restarted": False} if "restarted" in group else {}


def restart_averaging(groups: Groups, buckets: Sequence[Sequence[Bucket]]) -> None:
    """The same, and forgets what there is of averages; those that would begin later by themselves begin now, too."""
    start_averaging(groups, buckets)
    for group, of_group in zip(groups, buckets, strict=True):
        group |= {"restarted": True} if "restarted" in group else {}
        for bucket in of_group:
            bucket.shard.forget_averages()


def agreed_average(
    settlement: Settlement,
    agreement: Agreement,
    buckets: Sequence[Bucket],
    averages: Mapping[str, Average],
    name: str | None,
    error: Exception | None,
) -> str:
    """The suffix of the average of that ``name``, once every rank is to swap that in. Collective.

    Raises the same error on every rank, for an ``error`` of any of them as well.
    """
    suffix = ""
    try:
        suffix = suffix_of(averages, name)
    except (TypeError, ValueError) as caught:
        error = error or caught
    settlement.align("averaged_parameters()", buckets, error)
    if len(averages) > 1:
        agreement.require_equal("the average to swap in", [("state", f"ax{suffix}")])
    return suffix


class Swap:
    """Whether averages are in for the parameters now, and how they come there."""

    def __init__(self) -> None:
        self._inside = False

    def refuse(self, what: str) -> None:
        """Raises ``RuntimeError`` while they are in."""
        if self._inside:
            raise RuntimeError(f"{what} is not possible inside averaged_parameters(): leave the with block first")

    @contextlib.contextmanager
    def averages_in(self, buckets: Sequence[Bucket], suffix: str, modules: ParallelModules) -> Iterator[None]:
        """Inside, the parameters of ``buckets`` are their averages; after it, exactly what they were. Collective.

        Where the block raised, waits ``PATIENCE`` seconds for the other ranks. What they have not sent by then is
        waited for before the parameters are used by the optimizer again.
        """
        try:
            self._inside = True
            with averages_swapped_in(buckets, suffix, PATIENCE):
                yield
        finally:
            modules.drop_copies()
            self._inside = False


@contextlib.contextmanager
def averages_swapped_in(buckets: Sequence[Bucket], suffix: str, patience: float) -> Iterator[None]:
    """Inside, the parameters of ``buckets`` are their averages; after it, exactly what they were before. Collective.

    Each rank keeps its shard of the parameters: 1/N of their memory. Buckets in which nothing averages yet cost
    nothing: there, the average is the parameter.

    Args:
        suffix: which average, as in ``averages.by_suffix``.
        patience: seconds to wait for the other ranks where the block raised. What they have not sent by then is waited
            for before the parameters are used by the optimizer again.
    """
    averaging = [bucket for bucket in buckets if bucket.shard.has_average(suffix)]
    to_swap, to_restore = list(averaging), list(averaging)
    seconds: float | None = patience
    try:
        _each(to_swap, lambda bucket: bucket.shard.swap_in(suffix))
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
