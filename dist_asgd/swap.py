"""Swapping the average in for the parameters, and back."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
import torch.distributed as dist

from dist_asgd.averages.kinds import Average
from dist_asgd.averages.options import suffix_of
from dist_asgd.buckets.base import PATIENCE, Bucket
from dist_asgd.step.sync import Settlement
from dist_asgd.wrappers import ParallelModules

Groups = Sequence[dict[str, Any]]  # optimizer.param_groups
LEAVE = "leave the with block first"

# Why the state of the optimizer is not to be had inside.
NOT_BOTH = (
    "the model's state_dict() has the averages now, and a training that resumes from both would go on from the average."
    " Leave the with block first to save the training; save the model alone to ship its average"
)

P = ParamSpec("P")
R = TypeVar("R")


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


@dataclass(frozen=True, slots=True)
class Chosen:
    """An average by its name, of those that there are; None for the first."""

    averages: Mapping[str, Average]
    name: str | None


class Swap:
    """Whether averages are in for the parameters now.

    What must not meet a swap holds the lock while it is at work, and is refused inside. A swap of another thread is
    refused then, too: if it waited, it would come between two calls of that thread.
    """

    def __init__(self) -> None:
        self._inside: object | None = None  # who is
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def kept_out(self, what: str, why: str = LEAVE) -> Iterator[None]:
        """Raises ``RuntimeError`` while averages are in; they do not come in before the block ends."""
        with self._lock:
            self._refuse(what, why)
            yield

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The block is the only one that swaps. Raises ``RuntimeError``, with nothing changed, where it may not."""
        me = object()
        try:
            if not self._lock.acquire(blocking=False):
                raise RuntimeError(
                    "averaged_parameters() is not possible while another thread is in a step() of this optimizer, or "
                    "reads or loads its state: that would be of weights and averages. Wait for it"
                )
            try:
                self._refuse("averaged_parameters()", LEAVE)
                self._inside = me
            finally:
                self._lock.release()
            yield
        finally:
            if self._inside is me:
                self._inside = None

    def _refuse(self, what: str, why: str) -> None:
        if self._inside is not None:
            raise RuntimeError(f"{what} is not possible inside averaged_parameters(): {why}")


class Swapping(Protocol):
    _swap: Swap


def refused_inside(why: str = LEAVE) -> Callable[[Callable[Concatenate[Any, P], R]], Callable[Concatenate[Any, P], R]]:
    """For a method that raises ``RuntimeError`` while averages are in, saying ``why``.

    On this rank alone: to tell the others would be to wait for one that an exception has led out of the block, which
    itself waits for this one to leave.
    """

    def decorate(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
        @functools.wraps(method)
        def refusing(self: Swapping, *args: P.args, **kwargs: P.kwargs) -> R:
            with self._swap.kept_out(f"{method.__name__}()", why):
                return method(self, *args, **kwargs)

        return refusing

    return decorate


@contextlib.contextmanager
def averages_in(
    buckets: Sequence[Bucket],
    chosen: Chosen,
    settlement: Settlement,
    modules: ParallelModules,
    error: Exception | None,
) -> Iterator[None]:
    """Inside, the parameters of ``buckets`` are their averages; after it, exactly what they were before. Collective.

    Raises the same error on every rank where any rank brings an ``error``, cannot swap, or chose another average.
    """
    for bucket in buckets:
        bucket.wait()
    modules.drop_copies()
    error = error or modules.unknown_copies([param for bucket in buckets for param in bucket.params])
    suffix = ""
    try:
        suffix = suffix_of(chosen.averages, chosen.name)
    except (TypeError, ValueError) as caught:
        error = error or caught
    settlement.align("averaged_parameters()", buckets, error)
    if len(chosen.averages) > 1:
        settlement.agreement.require_equal("the average to swap in", [("state", f"ax{suffix}")])
    # suspended: the reductions of a backward on one rank only must not come between the all-gathers of all.
    with _swapped(buckets, suffix, modules), settlement.suspended():
        yield


@contextlib.contextmanager
def _swapped(buckets: Sequence[Bucket], suffix: str, modules: ParallelModules) -> Iterator[None]:
    """The swap itself. Each rank keeps its shard of the parameters: 1/N of their memory.

    What does not average yet is kept as well: what the block writes to parameters is no part of the training.

    Where the block raised, waits ``PATIENCE`` seconds for the other ranks. What they have not sent by then is waited
    for before the parameters are used by the optimizer again.
    """
    to_swap, to_restore = [bucket for bucket in buckets if bucket.shard.has_average(suffix)], list(buckets)
    seconds: float | None = PATIENCE
    try:
        for bucket in buckets:
            bucket.shard.keep()
        _each(to_swap, lambda bucket: bucket.shard.swap_in(suffix), in_turn=True)
        modules.refuse_old_graphs()
        torch.clear_autocast_cache()  # it would go on with what it has cast
        yield
        seconds = None
    finally:
        try:
            _restore(to_swap, to_restore, modules, in_turn=seconds is None)
        except BaseException:  # KeyboardInterrupt
            _restore(to_swap, to_restore, modules, in_turn=seconds is None)
            raise
        finally:
            for bucket in to_restore:  # it failed: what is this rank's own, at least
                bucket.shard.swap_out()
            modules.refuse_old_graphs()
            torch.clear_autocast_cache()
        _wait(buckets, seconds)


def _restore(to_swap: list[Bucket], to_restore: list[Bucket], modules: ParallelModules, *, in_turn: bool) -> None:
    """May be called again where it was interrupted: both lists hold what is still to do."""
    if not dist.is_initialized() and any(bucket.collectives is not None for bucket in to_restore):
        raise RuntimeError(
            "destroy_process_group() was called inside averaged_parameters(): each rank has its own shard of the "
            "parameters back, and averages where they are to come from other ranks. Leave the with block before it"
        )
    modules.drop_copies()
    error: RuntimeError | None = None
    for bucket in to_restore:
        try:
            bucket.check_parameters()  # takes up what model.to() has moved: else its values would stay
        except RuntimeError as caught:
            error = error or caught
    _each(to_swap, lambda bucket: bucket.shard.swap_out(), in_turn)  # the other ranks expect their all-gathers
    _each(to_restore, lambda bucket: bucket.shard.swap_out(), in_turn)
    if error is not None:
        raise error


@torch.no_grad()
def _each(to_do: list[Bucket], change: Callable[[Bucket], None], in_turn: bool) -> None:
    """Changes the shards of ``to_do`` and starts their all-gathers; the list loses what is done.

    Args:
        in_turn: wait for each: one that is under way takes the memory of a bucket, in gloo or here.
    """
    while to_do:
        bucket = to_do[0]
        bucket.wait()  # an all-gather that is under way would overwrite the change
        with _uninterrupted():  # no rank may start an all-gather twice
            change(bucket)
            bucket.start_gather(exact=True)
            del to_do[0]
        if in_turn:
            bucket.wait()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C comes when the block has ended, which must be soon."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is None or threading.current_thread() is not threading.main_thread():  # who alone hears of signals
        yield
        return
    heard = []
    try:
        signal.signal(signal.SIGINT, lambda *_: heard.append(True))
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if heard:
            signal.raise_signal(signal.SIGINT)


def _wait(buckets: Sequence[Bucket], seconds: float | None) -> None:
    """For all together no longer than ``seconds``."""
    deadline = None if seconds is None else time.monotonic() + seconds
    for bucket in buckets:
        bucket.wait(None if deadline is None else deadline - time.monotonic())
