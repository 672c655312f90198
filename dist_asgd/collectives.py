"""The two collectives of a step, over flat buffers: reduce-scatter of gradients and all-gather of parameters."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 gave the flat collectives new names and deprecated the old ones.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# Bytes that two ranks exchange by one all-to-all of gloo.
EXCHANGED = 2 * 2**20

POLL = 0.0002  # seconds


class Transfer(Protocol):
    """A collective under way."""

    def wait(self) -> None: ...

    def completes_within(self, seconds: float) -> bool:
        """Whether it is complete, on its device too, or has failed, at the latest after ``seconds``."""


@dataclass(frozen=True, slots=True)
class HostTransfer:
    """Collectives of gloo under way, as one."""

    works: Sequence[dist.Work]

    def wait(self) -> None:
        for work in self.works:
            work.wait()

    def completes_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        for work in self.works:
            left = deadline - time.monotonic()
            if not work.is_completed() and left > 0:
                with contextlib.suppress(RuntimeError):  # it took longer, or failed: then wait() will say so
                    work.wait(timedelta(seconds=left))
            if not work.is_completed():
                return False
        return True


@dataclass(frozen=True, slots=True)
class DeviceTransfer:
    """A collective under way whose ``wait()`` only makes the device's stream wait."""

    work: dist.Work

    def wait(self) -> None:
        self.work.wait()

    def completes_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not self.work.is_completed():
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL)
        return True


@dataclass(frozen=True, slots=True)
class Reduction:
    """A reduce-scatter under way. Keeps the buffers of the wire alive until ``finish``."""

    work: Transfer
    source: Tensor  # this rank's gradients
    parts: Sequence[Tensor]  # of the result, 1-D: this rank's shard from each rank, in order; or their sum alone
    world_size: int
    dtype: torch.dtype  # of the result

    def finish(self) -> Tensor:
        """Waits, and returns the mean of this rank's shard over the ranks, 1-D.

        Shards that came apart are added in rank order in ``dtype``, so the bits of the mean depend neither on the
        bucket layout nor on timing.
        """
        self.work.wait()
        total = self.parts[0].to(self.dtype, copy=True)
        for part in self.parts[1:]:
            total.add_(part)
        return total.div_(self.world_size)


@dataclass(frozen=True, slots=True)
class Collectives:
    """The collectives of one device type on one process group.

    Args:
        group: its backend for ``device_type`` is gloo, or one with a reduce-scatter of its own (nccl).
    """

    group: dist.ProcessGroup
    device_type: str

    @property
    def world_size(self) -> int:
        return dist.get_world_size(self.group)

    def start_reduce(self, source: Tensor, dtype: torch.dtype) -> Reduction:
        """Starts the mean of ``source`` (1-D, world_size shards, real) over the ranks; each rank gets its shard."""
        numel = len(source) // self.world_size
        if self._backend() == "gloo":
            parts, work = self._exchange(source, numel)
            return Reduction(work, source, parts, self.world_size, dtype)
        total = source.new_empty(numel)
        work = _reduce_scatter(total, source, group=self.group, async_op=True)
        return Reduction(DeviceTransfer(work), source, [total], self.world_size, dtype)

    def _exchange(self, source: Tensor, numel: int) -> tuple[Sequence[Tensor], Transfer]:
        """Gives each rank its shard, of ``numel`` elements, of ``source``, and takes mine from each, in rank order.

        gloo's reduce-scatter is an all-reduce inside, which sends twice the bytes. Its all-to-all begins with the
        sends, so two ranks first send one after the other: a link is busy in both directions only while several are
        under way. Therefore large shards go in many small ones, each with one partner to send to and one to receive
        from.
        """
        rank, size, most = dist.get_rank(self.group), self.world_size, EXCHANGED // source.element_size()
        if numel <= most:
            received = torch.empty_like(source)
            work = dist.all_to_all_single(received, source, group=self.group, async_op=True)
            return received.view(size, numel).unbind(), HostTransfer([work])
        shards = source.view(size, numel)
        parts = [shards[rank] if other == rank else torch.empty_like(shards[rank]) for other in range(size)]
        works = []
        for distance in range(1, size):
            to, origin = (rank + distance) % size, (rank - distance) % size
            for given, taken in zip(shards[to].split(most), parts[origin].split(most), strict=True):
                works.append(self._start_pairwise(given, to, taken, origin))
        return parts, HostTransfer(works)

    def _start_pairwise(self, given: Tensor, to: int, taken: Tensor, origin: int) -> dist.Work:
        ranks = range(self.world_size)
        sent, received = ([len(given) * (other == partner) for other in ranks] for partner in (to, origin))
        return dist.all_to_all_single(taken, given, received, sent, group=self.group, async_op=True)

    def start_gather(self, buffer: Tensor, shard: Tensor) -> Transfer:
        """Starts filling ``buffer`` (1-D) with the ``shard`` of every rank; ``shard`` is this rank's part of it."""
        most, on_host = EXCHANGED // shard.element_size(), self._backend() == "gloo"
        if not on_host or self.world_size != 2 or len(shard) <= most:
            work = all_gather(buffer, shard, group=self.group, async_op=True)
            return HostTransfer([work]) if on_host else DeviceTransfer(work)
        # Between two ranks that is an exchange, too. Among more, gloo's ring sends less between hosts of several ranks.
        other = 1 - dist.get_rank(self.group)
        taken = buffer.view(2, len(shard))[other]
        pairs = zip(shard.split(most), taken.split(most), strict=True)
        return HostTransfer([self._start_pairwise(given, other, part, other) for given, part in pairs])

    def broadcast(self, buffer: Tensor) -> None:
        """Rank 0's ``buffer`` to every rank."""
        dist.broadcast(buffer, group=self.group, group_src=0)

    def _backend(self) -> str:
        config = dict(part.split(":") for part in dist.get_backend_config(self.group).split(",") if ":" in part)
        return config.get(self.device_type, dist.get_backend(self.group))
