"""When gradients are reduced: hooks that start each bucket's reduction during backward, in one order on every rank.

[Note: passes] A *pass* starts the reduction of every bucket once, in bucket order. It opens with the first gradient of
a backward; a bucket goes out as soon as all its gradients are there and its predecessors went; what is left goes out,
with zeros for missing gradients, at the end of backward. So ranks that run the same number of backwards start the same
collectives in the same order, whatever gradients they lack. Passes are counted from the beginning, and the settlement
before a step brings a rank that ran fewer up to the others. A gradient knows the pass that it was begun in: ranks for
which that differs would add up gradients of different backwards.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch.utils.hooks import RemovableHandle

from dist_asgd._torch_private import current_autograd_node, current_graph_task_id, queue_callback
from dist_asgd.buckets.base import MAX_IN_FLIGHT, PATIENCE, Bucket
from dist_asgd.buckets.flat import ReplicatedBucket
from dist_asgd.buckets.hooks import register_hook, remove_hooks


class Reducer:
    """Starts the reductions of ``buckets`` as backward makes their gradients.

    The hooks hold it weakly: when the optimizer goes, gradients are the parameters' own again.
    """

    def __init__(self) -> None:
        self.buckets: list[ReplicatedBucket] = []
        self.enabled = True  # False inside no_sync()
        self.passes = 0  # begun so far
        self._dormant: list[bool] = []  # buckets that every rank has agreed to be frozen as a whole
        self._missing: list[int] = []  # by bucket: gradients that the open pass waits for
        self._arrived: list[bytearray] = []
        self._next: int | None = None  # the bucket to go out next; None when no pass is open
        self._task = -1  # the backward that last brought a gradient
        self._at_end: list[weakref.ref[_AtEnd]] = []  # of the backwards that are running
        self._in_flight: deque[ReplicatedBucket] = deque()  # a bucket as often as it has reductions under way
        self._patience = PATIENCE
        self._hooks: list[RemovableHandle] = []
        weakref.finalize(self, remove_hooks, self._hooks)

    def add(self, buckets: Sequence[Bucket]) -> None:
        """Takes on more buckets, of which it keeps those that reduce. Every rank adds the same."""
        self.close_pass()
        for bucket in buckets:
            if not (isinstance(bucket, ReplicatedBucket) and bucket.reduces):
                continue
            index = len(self.buckets)
            self.buckets.append(bucket)
            self._dormant.append(_is_frozen(bucket))
            for position, param in enumerate(bucket.params):
                self._hooks.append(register_hook(param, self.arrive, index, position))

    def close_pass(self, with_gradients: bool = True) -> None:
        """Starts what the open pass has not started yet, if one is open; with zeros unless ``with_gradients``."""
        while self._next is not None and self._next < len(self.buckets):
            self._start_next(with_gradients)
        self._next = None
        self._at_end.clear()

    def catch_up(self, passes: int) -> None:
        """Brings this rank to ``passes``, with zeros. Then waits for everything under way."""
        while self.passes < passes:
            self._open_pass()
            self.close_pass()
        while self._in_flight:
            self._in_flight.popleft().finish_oldest_reduce()
        self._patience = PATIENCE

    def reduce_now(self) -> None:
        """One more pass, over all buckets, for gradients that no hook saw: assigned by hand, or made in no_sync()."""
        self.passes += 1
        for bucket in self.buckets:
            self._start(bucket)
        self.catch_up(self.passes)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside, gradients stay on this rank, and ``p.grad`` is what this rank made."""
        self.close_pass()
        before, self.enabled = self.enabled, False
        for bucket in self.buckets if before else []:
            bucket.stand_down()
        try:
            yield
        finally:
            self.enabled = before
            for bucket in self.buckets if before else []:
                bucket.stand_in()

    def rest(self) -> None:
        """After the ranks have agreed on what is frozen: buckets that are frozen as a whole sit out the next passes."""
        self._dormant = [_is_frozen(bucket) for bucket in self.buckets]

    def arrive(self, index: int, position: int) -> None:
        """A hook: the parameter has its gradient."""
        if not (self.enabled and self.buckets[index].holds(position)):  # another optimizer may have taken it over
            return
        if any(at_end() is None for at_end in self._at_end):
            # The engine has let go of a backward without running what was to run at its end: it failed, and this
            # gradient is another one's already.
            self.close_pass(with_gradients=False)
        if self._next is None:
            self._open_pass()
        self._expect_end_of_backward()
        # Before this gradient is counted in, so that whoever else has a hook on the parameter (DDP) still finds it.
        self._start_ready()
        if not self._arrived[index][position]:
            self._arrived[index][position] = True
            self._missing[index] -= 1

    def _open_pass(self) -> None:
        self._next = 0
        self.passes += 1
        self._missing = [sum(param.requires_grad for param in bucket.params) for bucket in self.buckets]
        self._arrived = [bytearray(len(bucket.params)) for bucket in self.buckets]

    def _start_ready(self) -> None:
        while self._next is not None and self._next < len(self.buckets) and self._missing[self._next] <= 0:
            self._start_next()

    def _start_next(self, with_gradients: bool = True) -> None:
        index = self._next or 0
        self._next = index + 1
        if self._dormant[index]:
            self.buckets[index].stand_in()  # of what was unfrozen since: the step will reduce it
        else:
            self._start(self.buckets[index], with_gradients)

    @torch.no_grad()  # hooks run with gradients on in a backward that makes a graph of its own (create_graph=True)
    def _start(self, bucket: ReplicatedBucket, with_gradients: bool = True) -> None:
        while self._in_flight:
            full = len(self._in_flight) >= MAX_IN_FLIGHT
            if not self._in_flight[0].reduces_within(self._patience if full else 0.0):
                self._patience = 0.0 if full else self._patience
                break
            self._in_flight.popleft().finish_oldest_reduce()
            self._patience = PATIENCE
        bucket.start_reduce(self.passes, with_gradients)
        self._in_flight.append(bucket)

    def _expect_end_of_backward(self) -> None:
        task = current_graph_task_id()
        if task == self._task and self._at_end:
            return
        self._task = task
        at_end = _AtEnd(self)
        self._at_end.append(weakref.ref(at_end))
        queue_callback(at_end)

    def end_of_backward(self, at_end: _AtEnd) -> None:
        self._at_end = [other for other in self._at_end if other() is not at_end]
        # Inside a node, this is the end of a backward within a backward (reentrant checkpointing): the outer goes on.
        if current_autograd_node() is None:
            self.close_pass()


class _AtEnd:
    """What the autograd engine calls at the end of a backward. It alone holds it, as long as that backward runs."""

    def __init__(self, reducer: Reducer) -> None:
        self._reducer = weakref.ref(reducer)

    def __call__(self) -> None:
        reducer = self._reducer()
        if reducer is not None:
            reducer.end_of_backward(self)


def _is_frozen(bucket: ReplicatedBucket) -> bool:
    return not any(param.requires_grad for param in bucket.params)
