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

from dist_asgd.comm.process_groups import group_of_its_own

# torch 2.13 gave the flat collectives new names and deprecated the old ones.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# Up to so many bytes for each rank, one exchange of gloo is faster than one for each direction.
SMALL = 256 * 1024

# Bytes of one message. When a rank dies, gloo fails what has not begun; what has begun may wait out the timeout.
MESSAGE = 2**20

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
            if not work.is_completed() and left >= 1e-3:  # whole milliseconds, of which 0 means without end
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
    """The collectives of one device type between the ranks of a process group.

    Args:
        group: its backend is gloo, or one with a reduce-scatter of its own (nccl).
        downward: for gloo, another group of the same ranks, for what goes to lower ranks; None for other backends.
    """

    group: dist.ProcessGroup
    downward: dist.ProcessGroup | None

    @classmethod
    def on(cls, group: dist.ProcessGroup, device: torch.device) -> Collectives:
        """Those of ``group`` for tensors on ``device``. Collective."""
        config = dict(part.split(":") for part in dist.get_backend_config(group).split(",") if ":" in part)
        backend = config.get(device.type, dist.get_backend(group))
        return cls(group, group_of_its_own(group, "gloo") if backend == "gloo" else None)

    @property
    def world_size(self) -> int:
        return dist.get_world_size(self.group)

    def start_reduce(self, source: Tensor, dtype: torch.dtype) -> Reduction:
        """Starts the mean of ``source`` (1-D, world_size shards, real) over the ranks; each rank gets its shard."""
        rank, size = dist.get_rank(self.group), self.world_size
        shards = source.view(size, -1).unbind()
        if self.downward is None:
            total = torch.empty_like(shards[rank])
            work = _reduce_scatter(total, source, group=self.group, async_op=True)
            return Reduction(DeviceTransfer(work), source, [total], size, dtype)
        # gloo's reduce-scatter is an all-reduce inside, which sends twice the bytes.
        if shards[rank].nbytes <= SMALL:
            received = torch.empty_like(source)
            work = dist.all_to_all_single(received, source, group=self.group, async_op=True)
            return Reduction(HostTransfer([work]), source, received.view(size, -1).unbind(), size, dtype)
        parts = [shards[rank] if other == rank else torch.empty_like(shards[rank]) for other in range(size)]
        return Reduction(self._start_exchange(self.downward, shards, parts), source, parts, size, dtype)

    def start_gather(self, buffer: Tensor, shard: Tensor) -> Transfer:
        """Starts filling ``buffer`` (1-D) with the ``shard`` of every rank; ``shard`` is this rank's part of it."""
        if self.downward is None:
            return DeviceTransfer(all_gather(buffer, shard, group=self.group, async_op=True))
        # Among more than two, no rank of gloo's ring both sends to another and receives from it.
        if self.world_size > 2 or shard.nbytes <= SMALL:
            return HostTransfer([all_gather(buffer, shard, group=self.group, async_op=True)])
        return self._start_exchange(self.downward, [shard, shard], buffer.view(2, -1).unbind())

    def _start_exchange(
        self, downward: dist.ProcessGroup, given: Sequence[Tensor], taken: Sequence[Tensor]
    ) -> HostTransfer:
        """Gives each other rank its tensor of ``given``, and takes one from each; all are 1-D and of one length.

        A rank tells its peer that it is ready to receive over the connection on which it sends, and gloo's all-to-all
        begins with the sends: so the word often waits behind the data, and two ranks send one after the other. A group
        has connections of its own; with one for each direction, both directions of a link are busy.
        """
        rank, works = dist.get_rank(self.group), list[dist.Work]()
        for distance in range(1, self.world_size):
            works += _start_messages(self.group, given, rank + distance, taken, rank - distance)
            works += _start_messages(downward, given, rank - distance, taken, rank + distance)
        return HostTransfer(works)

    def broadcast(self, buffer: Tensor) -> None:
        """Rank 0's ``buffer`` to every rank."""
        dist.broadcast(buffer, group=self.group, group_src=0)


def _start_messages(
    group: dist.ProcessGroup, given: Sequence[Tensor], to: int, taken: Sequence[Tensor], origin: int
) -> list[dist.Work]:
    """Sends ``given[to]`` and receives ``taken[origin]``, where there are such ranks."""
    ranks, nothing = range(dist.get_world_size(group)), given[0][:0]
    sent = given[to] if to in ranks else nothing
    received = taken[origin] if origin in ranks else nothing
    works, most = [], MESSAGE // nothing.element_size()
    for first in range(0, len(given[0]), most):
        out, into = sent[first : first + most], received[first : first + most]
        gives, takes = ([len(part) * (rank == at) for rank in ranks] for part, at in ((out, to), (into, origin)))
        works.append(dist.all_to_all_single(into, out, takes, gives, group=group, async_op=True))
    return works
