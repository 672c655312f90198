"""Steps of ranks that have run out of inputs, inside ``torch.distributed.algorithms.join.Join``.

A rank that has left its loop is *joined*. It owns a shard of each bucket, so it takes every step of the other ranks
with them, as their *shadow*, with the options that they have. With ``gradients="local"`` it contributes gradients of
zeros. With ``gradients="reduced"`` it gets the gradients of the first rank that has not joined, because
DistributedDataParallel does not hand its averages to joined ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join, Joinable, JoinHook

from dist_asgd._torch_private import is_first_joinable
from dist_asgd.buckets.base import PATIENCE, Bucket
from dist_asgd.buckets.flat import FlatBucket
from dist_asgd.buckets.reducer import Reducer
from dist_asgd.comm.consensus import Agreement
from dist_asgd.kernels.tensor_list import as_real
from dist_asgd.step.validation import Groups

Options = list[dict[str, Any]]  # the options of each param group
Shared = tuple[Options, list[list[bool]]]  # the options, and by bucket which gradients exist


class StepJoin(JoinHook):
    """What ``Join`` asks of an optimizer, and what the optimizer does inside ``Join`` before it agrees on a step.

    Args:
        optimizer: is told that it has not joined where it is the first joinable.
        groups: ``optimizer.param_groups``.
        buckets: all buckets of the optimizer.
        agreement: exchanges among the ranks of the optimizer.
        reducer: starts the reductions of the buckets that average gradients.
        find_unused: whether a parameter may lack a gradient on some ranks.
        divide_by_initial_world_size: whether a mean of gradients counts ranks that have joined, with zeros.
        shadow: takes a step of a joined rank.

    Raises:
        RuntimeError: a parameter is not plain.
    """

    def __init__(
        self,
        optimizer: Joinable,
        groups: Groups,
        buckets: Sequence[Bucket],
        agreement: Agreement,
        reducer: Reducer,
        *,
        find_unused: bool,
        divide_by_initial_world_size: bool,
        shadow: Callable[[], None],
    ) -> None:
        self._optimizer, self._groups, self._agreement, self._reducer = optimizer, groups, agreement, reducer
        self._find_unused, self._divides_by_all, self._shadow = find_unused, divide_by_initial_world_size, shadow
        self._buckets = [bucket for bucket in buckets if isinstance(bucket, FlatBucket)]
        for bucket in buckets:
            if bucket not in self._buckets:
                raise RuntimeError(
                    f"Join works with plain parameters, and {bucket.names[0]!r} is a DTensor or a slice (FSDP2, FSDP1, "
                    "tensor parallelism), whose forward and backward have collectives that a joined rank does not "
                    "take part in: give every rank equally many inputs"
                )
        self._joined = self._notified = self._ended = False
        self._work: dist.Work | None = None
        self._active = agreement.world_size  # number of ranks that have not joined
        reducer.before_pass = self.notify

    # Called by Join on a joined rank ---------------------------------------------------------------------------------

    @torch.no_grad()
    def main_hook(self) -> None:
        """Takes one step as the shadow of the other ranks. Collective."""
        self._joined = True
        self._drop_gradients()
        if self._reducer.buckets:
            self._contribute_zeros()
        self._shadow()
        self._drop_gradients()

    def post_hook(self, is_last_joiner: bool) -> None:
        """Ends the shadowing, with the options of the last rank to join. Collective.

        Parameters and state are equal on all ranks, which have all taken every step.
        """
        everyone = self._agreement.gather(self._options() if is_last_joiner else None)
        self._adopt(next(options for options in everyone if options is not None))
        self._ended, self._reducer.before_pass, self._reducer.patience = True, None, PATIENCE

    # Called by the optimizer -----------------------------------------------------------------------------------------

    def notify(self) -> None:
        """Tells ``Join``, once for each step, that this rank has not joined; before the first collective of the step.

        Raises:
            RuntimeError: the gradients are averaged by another joinable, which ``Join`` has not been given first.
        """
        if self._notified or self._joined:
            return
        if is_first_joinable(self._optimizer) and not self._reducer.buckets and self._agreement.world_size > 1:
            raise RuntimeError(
                "inside Join, the model that averages the gradients comes before the optimizer, since its forward has "
                "the first collective of an iteration: Join([ddp_model, optimizer])"
            )
        self._notified, self._work = True, Join.notify_join_context(self._optimizer)

    def prepare_step(self) -> None:
        """Gives joined ranks what they need for the step of the others. Collective; nothing after ``Join``."""
        if self._ended:
            return
        self.notify()
        if self._work is not None:
            self._work.wait()
        self._notified, self._work, self._active = False, None, self._agreement.world_size
        if not self._agreement.maximum("step() inside Join", [self._joined])[0]:
            return
        self._reducer.patience = 0.0  # a joined rank runs one pass of a step, and others only when they step
        with self._agreement.together("step() inside Join"):
            self._require_unchanged_gradients()
        present = [[param.grad is not None for param in bucket.params] for bucket in self._buckets]
        everyone: list[Shared | None] = self._agreement.gather(None if self._joined else (self._options(), present))
        self._active = sum(shared is not None for shared in everyone)
        source, shared = next((rank, shared) for rank, shared in enumerate(everyone) if shared is not None)
        if self._joined:
            self._adopt(shared[0])
        if not self._reducer.buckets:
            for bucket, flags in zip(self._buckets, shared[1], strict=True):
                self._share_gradients(bucket, flags, source)

    def scale_gradients(self) -> None:
        """Makes means over all ranks, with zeros of joined ones, means over the others, if ``Join`` was told so."""
        if self._ended or self._divides_by_all or self._active == self._agreement.world_size:
            return
        for bucket in self._reducer.buckets:
            bucket.finish_reduce()
            if bucket.grad is not None:
                bucket.grad.mul_(self._agreement.world_size).div_(self._active)

    def _require_unchanged_gradients(self) -> None:
        """Raises ``RuntimeError`` where operators were called on gradients of which a joined rank has a part."""
        for bucket in self._reducer.buckets:
            for name, piece in zip(bucket.names, bucket.gradient_pieces, strict=True):
                if piece.is_read:
                    raise RuntimeError(
                        f"p.grad of {name!r} was read or changed after backward, inside Join and with a rank that has "
                        "no more inputs: that rank has a part of the gradient, which it did not change. Scale the loss "
                        "instead, or use DistributedDataParallel, gradients='reduced' and Join([ddp_model, optimizer])"
                    )

    def _options(self) -> Options:
        kept = ("params", "param_names")
        return [{key: value for key, value in group.items() if key not in kept} for group in self._groups]

    def _adopt(self, options: Options) -> None:
        for group, adopted in zip(self._groups, options, strict=True):
            group.update(adopted)

    # Gradients of a joined rank --------------------------------------------------------------------------------------

    def _contribute_zeros(self) -> None:
        """Runs the reductions that the other ranks run in their backward, with zeros. Collective."""
        for bucket in self._reducer.buckets if not self._find_unused else []:
            for param in bucket.params:
                if param.requires_grad:
                    param.grad = torch.zeros_like(param)
        self._reducer.run_pass()

    def _share_gradients(self, bucket: FlatBucket, present: Sequence[bool], source: int) -> None:
        """Gives joined ranks the gradients that rank ``source`` of the optimizer has. Collective."""
        if bucket.collectives is None:
            return
        flat = torch.zeros_like(bucket.buffer)  # 1-D
        views = [
            placement.view(flat[span.start : span.stop])
            for placement, span in zip(bucket.placements, bucket.layout.spans, strict=True)
        ]
        for param, view in zip(bucket.params, views, strict=True):
            if self._agreement.rank == source and param.grad is not None:
                view.copy_(param.grad)
        bucket.collectives.broadcast(as_real(flat), source)
        for param, view, exists in zip(bucket.params, views, present, strict=True):
            if self._joined and exists:
                param.grad = view

    def _drop_gradients(self) -> None:
        for bucket in self._buckets:
            for param in bucket.params:
                param.grad = None
        for reducing in self._reducer.buckets:
            reducing.drop_gradient()
