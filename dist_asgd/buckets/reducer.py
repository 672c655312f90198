"""Starts the reduction of each bucket's gradients during backward, by hooks, in one order on every rank.

[Note: passes] A *pass* starts the reduction of every bucket once, in bucket order. It opens with the first gradient of
a backward. A bucket's reduction starts as soon as all its gradients exist and the reductions of the buckets before it
have started. At the end of backward the remaining reductions start, with zeros for missing gradients. So ranks that run
equally many backwards start the same collectives in the same order, whatever gradients they lack. Passes are counted
from the construction of the optimizer. The agreement before a step (step/sync.py) brings a rank that has run fewer
passes up to the other ranks. A gradient records its first pass; if ranks disagree on this number, they would add up
gradients of different backwards.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.hooks import RemovableHandle

from dist_asgd._torch_private import current_autograd_node, current_graph_task_id, outside_graphs, queue_callback
from dist_asgd.buckets.base import DEVICE_BYTES, MAX_IN_FLIGHT, PATIENCE, Bucket
from dist_asgd.buckets.flat import FlatBucket
from dist_asgd.buckets.hooks import register_hook, remove_hooks
from dist_asgd.comm.profiling import profiled


class Reducer:
    """Starts the reductions of ``buckets`` as backward makes their gradients.

    Hooks hold the reducer weakly. When the optimizer is deleted they are removed, and gradients are plain again. A lock
    keeps hooks apart: backward runs those of parameters on several devices in a thread for each device.

    Attributes:
        buckets: the buckets that average gradients, in the order of their reductions.
        enabled: whether backward reduces gradients; False inside ``no_sync()``.
        passes: number of passes that this rank has begun.
        still_fits: whether the buckets fit the model, asked before each pass; None once they stay. Where they do not,
            gradients are left to ``step()``, which builds the buckets again.
        patience: seconds that a host waits for a reduction where too many are under way; 0 where other ranks are known
            to begin theirs later, in their ``step()``: then a device does not wait either.
        before_pass: called before backward opens a pass; None for nothing.
    """

    def __init__(self) -> None:
        self.buckets: list[FlatBucket] = []
        self.enabled = True
        self.passes = 0
        self.still_fits: Callable[[], bool] | None = None
        self._fits = True
        self.before_pass: Callable[[], None] | None = None
        self._skipped: list[bool] = []  # by bucket: whether all ranks skip it, as it is frozen
        self._missing: list[int] = []  # by bucket: number of gradients that the open pass waits for
        self._arrived: list[bytearray] = []  # by bucket and position: whether the open pass has the gradient
        self._next: int | None = None  # the bucket to reduce next; None when no pass is open
        self._graph_task = -1  # number of the backward that last made a gradient
        self._ends: list[weakref.ref[_EndOfBackward]] = []  # one for each running backward
        self._in_flight: deque[FlatBucket] = deque()  # one entry for each reduction under way, oldest first
        self.patience = self._patience = PATIENCE
        self._lock = threading.RLock()  # reentrant: the start of a reduction may run code that makes gradients
        self._hooks: list[RemovableHandle] = []
        weakref.finalize(self, remove_hooks, self._hooks)

    def add(self, buckets: Sequence[Bucket]) -> None:
        """Adds buckets that average gradients and skips the rest. Every rank must add equal buckets in one order."""
        self.close_pass()
        for bucket in buckets:
            if not (isinstance(bucket, FlatBucket) and bucket.reduces):
                continue
            index = len(self.buckets)
            self.buckets.append(bucket)
            self._skipped.append(_is_frozen(bucket))
            for position, param in enumerate(bucket.params):
                self._hooks.append(register_hook(param, self.gradient_ready, index, position))

    def clear(self) -> None:
        """Removes all buckets and hooks, before the buckets are built again. No pass may be open."""
        remove_hooks(self._hooks)
        self._hooks.clear()
        self.buckets, self._skipped, self._fits = [], [], True

    def settle(self) -> None:
        """Reduces gradients in every backward from now on, since the buckets stay."""
        self.still_fits, self._fits = None, True

    def close_pass(self, with_gradients: bool = True) -> None:
        """Starts the remaining reductions of the open pass, if one is open. Collective.

        Args:
            with_gradients: False to contribute zeros and keep this rank's gradients.
        """
        while self._next is not None and self._next < len(self.buckets):
            self._start_next(with_gradients)
        self._next = None
        self._ends.clear()

    def catch_up(self, passes: int) -> None:
        """Runs passes with zeros until ``passes`` have begun, then waits for all reductions. Collective."""
        while self.passes < passes:
            self._open_pass()
            self.close_pass()
        while self._in_flight:
            self._in_flight.popleft().finish_oldest_reduce()
        self._patience = self.patience

    def finish_within(self, seconds: float) -> None:
        """Waits at most ``seconds`` for reductions under way, which other ranks may never begin; leaves the rest."""
        end = time.monotonic() + seconds
        while self._in_flight and self._in_flight[0].reduces_within(max(end - time.monotonic(), 0.0)):
            self._in_flight.popleft().finish_oldest_reduce()

    def run_pass(self) -> None:
        """Runs one pass without a backward, and does not wait for its reductions. Collective."""
        self.close_pass()
        self._open_pass()
        self.close_pass()

    def reduce_now(self) -> None:
        """Runs one pass over all buckets, for gradients without a hook: assigned, or from ``no_sync()``. Collective."""
        self.passes += 1
        for bucket in self.buckets:
            self._start(bucket)
        self.catch_up(self.passes)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside the block backward does not reduce, and ``p.grad`` is this rank's gradient."""
        self.close_pass()
        before, self.enabled = self.enabled, False
        for bucket in self.buckets if before else []:
            bucket.detach_placeholders()
        try:
            yield
        finally:
            self.enabled = before
            for bucket in self.buckets if before else []:
                bucket.attach_placeholders()

    def skip_frozen_buckets(self) -> None:
        """Leaves frozen buckets out of the next passes. Every rank must have frozen the same parameters."""
        self._skipped = [_is_frozen(bucket) for bucket in self.buckets]

    def gradient_ready(self, index: int, position: int) -> None:
        """Hook: backward has accumulated the gradient of parameter ``position`` of bucket ``index``."""
        with self._lock:
            if self.enabled and self._fits and self.buckets[index].holds(position):  # else another optimizer took it
                self._count_in(index, position)

    def _count_in(self, index: int, position: int) -> None:
        """Counts a gradient in, and starts the reductions for which nothing is missing."""
        if any(at_end() is None for at_end in self._ends):
            # The engine has dropped the callback of an earlier backward without calling it: that backward failed, and
            # this gradient belongs to a new one.
            self.close_pass(with_gradients=False)
        if self._next is None:
            self._fits = self.still_fits is None or self.still_fits()
            if not self._fits:
                return
            if self.before_pass is not None:
                self.before_pass()
            self._open_pass()
        self._expect_end_of_backward()
        # Buckets start before this gradient counts, so that later hooks of the parameter (DDP) still find the gradient.
        while self._next is not None and self._next < len(self.buckets) and self._missing[self._next] <= 0:
            self._start_next()
        if not self._arrived[index][position]:
            self._arrived[index][position] = True
            self._missing[index] -= 1

    def _open_pass(self) -> None:
        self._next = 0
        self.passes += 1
        self._missing = [sum(param.requires_grad for param in bucket.params) for bucket in self.buckets]
        self._arrived = [bytearray(len(bucket.params)) for bucket in self.buckets]

    def _start_next(self, with_gradients: bool = True) -> None:
        index = self._next or 0
        self._next = index + 1
        if self._skipped[index]:
            self.buckets[index].attach_placeholders()  # parameters unfrozen since; the step reduces them
        else:
            self._start(self.buckets[index], with_gradients)

    @torch.no_grad()  # hooks record gradients in a backward with create_graph=True
    def _start(self, bucket: FlatBucket, with_gradients: bool = True) -> None:
        self._make_room()
        with profiled("reduce"):
            bucket.start_reduce(self.passes, with_gradients)
        self._in_flight.append(bucket)

    def _make_room(self) -> None:
        """Finishes the reductions that are complete, and waits where too much is under way.

        On a device the current stream waits, so that memory is bounded in the order of the stream, and the host goes
        on. A host waits for a while.
        """
        while self._in_flight:
            oldest, full = self._in_flight[0], self._is_full()
            on_stream = full and not oldest.waits_on_host and self.patience > 0
            if not (on_stream or oldest.reduces_within(self._patience if full else 0.0)):
                self._patience = 0.0 if full else self._patience
                break
            self._in_flight.popleft().finish_oldest_reduce()
            self._patience = self.patience

    def _is_full(self) -> bool:
        """Whether the oldest reduction under way has to end before the next one starts."""
        if len(self._in_flight) < MAX_IN_FLIGHT or self._in_flight[0].waits_on_host:
            return len(self._in_flight) >= MAX_IN_FLIGHT
        return sum(bucket.buffer.nbytes for bucket in self._in_flight) >= DEVICE_BYTES

    def _expect_end_of_backward(self) -> None:
        task = current_graph_task_id()
        if task == self._graph_task and self._ends:
            return
        self._graph_task = task
        at_end = _EndOfBackward(self)
        self._ends.append(weakref.ref(at_end))
        queue_callback(at_end)

    def end_of_backward(self, at_end: _EndOfBackward) -> None:
        with self._lock:
            self._ends = [other for other in self._ends if other() is not at_end]
            # Inside a node, an inner backward (reentrant checkpointing) has ended, and the outer one goes on.
            if current_autograd_node() is None:
                self.close_pass()


class _EndOfBackward:
    """Callback at the end of a backward. Only the autograd engine holds it, so it dies with the backward."""

    def __init__(self, reducer: Reducer) -> None:
        self._reducer = weakref.ref(reducer)

    @outside_graphs  # compiled autograd calls it while dynamo still looks for code to compile
    def __call__(self) -> None:
        reducer = self._reducer()
        if reducer is not None:
            reducer.end_of_backward(self)


def _is_frozen(bucket: FlatBucket) -> bool:
    return not any(param.requires_grad for param in bucket.params)
