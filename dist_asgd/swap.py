"""Swap of an average for the parameters and back, the guard around it, and the start of averaging."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
import torch.distributed as dist

from dist_asgd.buckets.base import PATIENCE, Bucket, ParameterBucket
from dist_asgd.comm.consensus import Agreement
from dist_asgd.comm.profiling import profiled
from dist_asgd.step.validation import Groups
from dist_asgd.wrappers import ParallelModules

LEAVE_FIRST = "leave the with block first"

# Reason why the state of the optimizer cannot be read while averages are swapped in.
NOT_BOTH = (
    "the model's state_dict() has the averages now, and a training that resumes from both would go on from the average."
    " Leave the with block first to save the training; save the model alone to ship its average"
)

P = ParamSpec("P")
R = TypeVar("R")


def start_averaging(groups: Groups, buckets: Sequence[Sequence[Bucket]], agreement: Agreement) -> None:
    """Sets ``t0`` of each param group to the largest number of steps that a parameter of the group has taken.

    Collective where there are slices: of a slice without elements, only other ranks know the steps.

    Args:
        groups: ``optimizer.param_groups``.
        buckets: the buckets of each group.
        agreement: among the ranks of the optimizer.
    """
    furthest = [[bucket.furthest() for bucket in of_group] for of_group in buckets]
    steps = [max((scalars.step for scalars in of_group if scalars is not None), default=0) for of_group in furthest]
    if any(bucket.presharded for of_group in buckets for bucket in of_group):
        steps = [max(of_ranks) for of_ranks in zip(*agreement.gather(steps), strict=True)]
    for group, most in zip(groups, steps, strict=True):
        group["t0"] = float(most)
        group |= {"restarted": False} if "restarted" in group else {}


def restart_averaging(groups: Groups, buckets: Sequence[Sequence[Bucket]], agreement: Agreement) -> None:
    """Sets ``t0`` like ``start_averaging``, forgets all averages and lets each of them begin now, ``Tail`` included."""
    start_averaging(groups, buckets, agreement)
    for group, of_group in zip(groups, buckets, strict=True):
        group |= {"restarted": True} if "restarted" in group else {}
        for bucket in of_group:
            bucket.shard.forget_averages()


class SwapGuard:
    """Lock that keeps swaps of averages apart from steps, loads and reads of the state.

    Those operations are refused while averages are swapped in, on every thread. A swap is refused while another thread
    is in such an operation: if it waited, it would come between two calls of that thread.
    """

    def __init__(self) -> None:
        self._swap: object | None = None  # identifies the swap that averages are in by; None outside of swaps
        self._lock = threading.RLock()

    @property
    def active(self) -> bool:
        """Whether averages are swapped in."""
        return self._swap is not None

    @contextlib.contextmanager
    def no_swap(self, operation: str, reason: str = LEAVE_FIRST) -> Iterator[None]:
        """Keeps swaps out of the block. Raises ``RuntimeError``, giving the ``reason``, while averages are swapped in.

        Args:
            operation: the user's call, for the message.
        """
        with self._lock:
            self._refuse(operation, reason)
            yield

    @contextlib.contextmanager
    def swapping(self) -> Iterator[None]:
        """Marks the block as a swap.

        Raises ``RuntimeError``, with nothing changed, inside another swap and while another thread is in ``no_swap``.
        """
        swap = object()
        try:
            if not self._lock.acquire(blocking=False):
                raise RuntimeError(
                    "averaged_parameters() is not possible while another thread is in a step() of this optimizer, or "
                    "reads or loads its state: that would be of weights and averages. Wait for it"
                )
            try:
                self._refuse("averaged_parameters()", LEAVE_FIRST)
                self._swap = swap
            finally:
                self._lock.release()
            yield
        finally:
            if self._swap is swap:
                self._swap = None

    def _refuse(self, operation: str, reason: str) -> None:
        if self._swap is not None:
            raise RuntimeError(f"{operation} is not possible inside averaged_parameters(): {reason}")


class HasSwapGuard(Protocol):
    """Object whose methods ``refused_during_swap`` can decorate."""

    _swap_guard: SwapGuard


def refused_during_swap(
    reason: str = LEAVE_FIRST,
) -> Callable[[Callable[Concatenate[Any, P], R]], Callable[Concatenate[Any, P], R]]:
    """Decorates a method so that it raises ``RuntimeError``, giving the ``reason``, while averages are swapped in.

    The error stays on the rank that called the method. Telling the other ranks would mean waiting for a rank that an
    exception has led out of the swap, and that rank waits for this one to leave the swap.
    """

    def decorate(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
        @functools.wraps(method)
        def refusing(self: HasSwapGuard, *args: P.args, **kwargs: P.kwargs) -> R:
            with self._swap_guard.no_swap(f"{method.__name__}()", reason):
                return method(self, *args, **kwargs)

        return refusing

    return decorate


@contextlib.contextmanager
def swapped(buckets: Sequence[ParameterBucket], suffix: str, modules: ParallelModules) -> Iterator[None]:
    """Inside the block, the parameters of ``buckets`` hold an average; afterwards, what they held before. Collective.

    Each rank keeps a copy of its shard of the parameters, 1/N of their memory. It does so also for parameters without
    an average, because writes of the block to parameters are dropped.

    If the block raises, the exit waits at most ``PATIENCE`` seconds for the all-gathers. The optimizer waits for
    unfinished ones before it uses the parameters again.

    Args:
        buckets: all buckets of the optimizer, whose parameters are complete.
        suffix: which average, as the suffix of ``ax`` in the state: ``""`` or ``"_<name>"``.
        modules: the modules whose whole copies of parameters are dropped when the block ends.
    """
    to_swap, to_restore = [bucket for bucket in buckets if bucket.shard.has_average(suffix)], list(buckets)
    seconds: float | None = PATIENCE
    try:
        for bucket in buckets:
            bucket.shard.save_parameters()
        with profiled("swap"):
            _change_shards(to_swap, lambda bucket: bucket.shard.swap_in(suffix), in_turn=True)
        modules.refuse_old_graphs()
        torch.clear_autocast_cache()  # autocast would go on with casts of the former values
        yield
        seconds = None
    finally:
        try:
            with profiled("swap"):
                _restore(to_swap, to_restore, modules, in_turn=seconds is None)
        except BaseException:  # an interrupt, after which the rest is still to be restored
            _restore(to_swap, to_restore, modules, in_turn=seconds is None)
            raise
        finally:
            for bucket in to_restore:  # left over where restoring failed: this rank's own shards come back at least
                bucket.shard.swap_out()
            modules.refuse_old_graphs()
            torch.clear_autocast_cache()
        _wait_for(buckets, seconds)


def _restore(
    to_swap: list[ParameterBucket], to_restore: list[ParameterBucket], modules: ParallelModules, *, in_turn: bool
) -> None:
    """Writes the kept shards back and starts the all-gathers of all buckets.

    Takes the finished buckets out of both lists, so that a call after an interrupt goes on where the first one stopped.

    Args:
        to_swap: the buckets that an interrupt has left without their average: the other ranks expect an all-gather.
        to_restore: all buckets that are not restored yet.
        in_turn: whether to wait for each all-gather before the next one.

    Raises:
        RuntimeError: where a parameter is not what the optimizer was built for any more, or ``torch.distributed`` has
            been shut down.
    """
    if not dist.is_initialized() and any(bucket.collectives is not None for bucket in to_restore):
        raise RuntimeError(
            "destroy_process_group() was called inside averaged_parameters(): each rank has its own shard of the "
            "parameters back, and averages where they are to come from other ranks. Leave the with block before it"
        )
    modules.drop_copies()
    error: RuntimeError | None = None
    for bucket in to_restore:
        try:
            # Attaches memory that model.to() has replaced. A process that was sent the averages keeps them.
            bucket.check_parameters(leaves_shared=True)
        except RuntimeError as caught:
            error = error or caught
    _change_shards(to_swap, lambda bucket: bucket.shard.swap_out(), in_turn)
    _change_shards(to_restore, lambda bucket: bucket.shard.swap_out(), in_turn)
    if error is not None:
        raise error


@torch.no_grad()
def _change_shards(to_do: list[ParameterBucket], change: Callable[[ParameterBucket], None], in_turn: bool) -> None:
    """Applies ``change`` to each bucket of ``to_do``, starts its all-gather and takes it out of the list. Collective.

    Args:
        in_turn: whether to wait for each all-gather, since one under way takes as much memory as the bucket.
    """
    while to_do:
        bucket = to_do[0]
        bucket.wait()  # an all-gather that is under way would overwrite the change
        with _interrupt_delayed():  # else the bucket might be done again, and its all-gather started twice
            change(bucket)
            bucket.start_gather(exact=True)
            del to_do[0]
        if in_turn:
            bucket.wait()


@contextlib.contextmanager
def _interrupt_delayed() -> Iterator[None]:
    """Delays ``KeyboardInterrupt`` until the end of the block, which must be short."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is None or threading.current_thread() is not threading.main_thread():  # which runs handlers
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


def _wait_for(buckets: Sequence[ParameterBucket], seconds: float | None) -> None:
    """Waits until the parameters of ``buckets`` are complete, at most ``seconds`` altogether; None: without limit."""
    deadline = None if seconds is None else time.monotonic() + seconds
    for bucket in buckets:
        bucket.wait(None if deadline is None else deadline - time.monotonic())
