"""Starts the two collectives of a step: the reduce-scatter of flat gradients and the all-gather of flat parameters.

On gloo both are built from all-to-all exchanges where these are faster than gloo's own collectives.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from dist_asgd.comm.process_groups import SeparateGroups
from dist_asgd.comm.streams import used_by_current_stream

# torch 2.13 gave the flat collectives new names and deprecated the old ones.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# Bytes of a shard up to which one exchange of gloo is faster than separate exchanges for the two directions.
SMALL = 256 * 1024

# Bytes of one message. When a rank dies, gloo fails the messages that have not begun, while a message under way may
# wait for the whole timeout: short messages make a survivor's error come early.
MESSAGE = 2**20

POLL = 0.0002  # seconds between two looks at a collective of a device


@dataclass(frozen=True, slots=True)
class HostTransfer:
    """Several gloo collectives under way that are waited for as one."""

    works: Sequence[dist.Work]
    groups: SeparateGroups  # has the process groups that ``works`` run in

    def wait(self) -> None:
        """Waits for all; raises ``RuntimeError`` if one failed."""
        with self.groups.using():
            for work in self.works:
                work.wait()

    def completes_within(self, seconds: float) -> bool:
        """Waits at most ``seconds``; returns whether all have completed or failed."""
        deadline = time.monotonic() + seconds
        for work in self.works:
            left = deadline - time.monotonic()
            if not work.is_completed() and left >= 1e-3:  # gloo counts whole milliseconds, and 0 means no limit
                with contextlib.suppress(RuntimeError):  # it took longer or failed; wait() raises the latter
                    work.wait(timedelta(seconds=left))
            if not work.is_completed():
                return False
        return True


@dataclass(frozen=True, slots=True)
class DeviceTransfer:
    """A collective of a device's backend under way."""

    work: dist.Work

    def wait(self) -> None:
        """Makes the device's current stream wait, and not the host; raises ``RuntimeError`` if it failed."""
        self.work.wait()

    def completes_within(self, seconds: float) -> bool:
        """Waits at most ``seconds``; returns whether the collective has completed, on its device too, or failed."""
        deadline = time.monotonic() + seconds
        while not self.work.is_completed():
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL)
        return True


# A collective that has been started and not yet waited for.
Transfer: TypeAlias = HostTransfer | DeviceTransfer


@dataclass(frozen=True, slots=True)
class Reduction:
    """A reduce-scatter under way. Keeps the buffers that are sent and received alive until ``finish``."""

    work: Transfer
    source: Tensor  # 1-D, world_size shards: this rank's gradients
    parts: Sequence[Tensor]  # 1-D: this rank's shard as each rank has it, in rank order; or their sum alone
    world_size: int
    dtype: torch.dtype  # the dtype in which ``finish`` adds and returns

    def finish(self) -> Tensor:
        """Waits, and returns the mean over the ranks of this rank's shard: 1-D, in ``dtype``.

        Shards that were received separately are added in rank order, so the bits of the mean depend neither on the
        bucket layout nor on timing.
        """
        self.work.wait()
        first = self.parts[0]
        is_alone = first.untyped_storage().nbytes() == first.nbytes  # else it would keep all shards in memory
        total = first.to(self.dtype, copy=not is_alone)
        for part in self.parts[1:]:
            total.add_(part)
        used_by_current_stream(self.source, *self.parts)
        return total.div_(self.world_size)


@dataclass(frozen=True, slots=True)
class Collectives:
    """The collectives between the ranks of a process group for tensors of one device type.

    Every method is collective: all ranks of ``group`` must call it in the same order.

    Args:
        group: its backend is gloo, or one that has a reduce-scatter, such as nccl.
        downward: a second gloo group of the same ranks that carries data to lower ranks; None for other backends.
        groups: has both groups, and keeps them from other optimizers.
    """

    group: dist.ProcessGroup
    downward: dist.ProcessGroup | None
    groups: SeparateGroups

    @classmethod
    def on(
        cls, groups: SeparateGroups, ranks: Sequence[int], device: torch.device, backend: str | None = None
    ) -> Collectives:
        """Returns the collectives among ``ranks`` for tensors on ``device``; with gloo, they have a second group.

        Args:
            groups: makes the process groups.
            ranks: global ranks.
            backend: as ``torch.distributed.new_group`` takes it; None for the backends of the user's group.
        """
        group = groups.of(ranks, backend)
        config = dict(part.split(":") for part in dist.get_backend_config(group).split(",") if ":" in part)
        gloo = config.get(device.type, dist.get_backend(group)) == "gloo"
        return cls(group, groups.of(ranks, "gloo", "downward") if gloo else None, groups)

    @property
    def world_size(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def waits_on_host(self) -> bool:
        """Whether ``wait()`` of a transfer blocks the host. Otherwise a stream waits, and the host goes on."""
        return self.downward is not None

    def start_reduce(self, source: Tensor, dtype: torch.dtype) -> Reduction:
        """Starts a reduce-scatter that gives each rank the mean over the ranks of its shard of ``source``.

        Args:
            source: 1-D, real; its length is a multiple of world_size. It must not change until ``Reduction.finish``.
            dtype: real; the dtype of the mean. Gradients are sent in the dtype of ``source`` and added in ``dtype``. On
                gloo they are added in rank order. Other backends' reduce-scatter takes an order of its own where both
                dtypes are the same.
        """
        self.groups.count()
        rank, size = dist.get_rank(self.group), self.world_size
        shards = source.view(size, -1).unbind()
        if self.downward is None and source.dtype == dtype:
            total = torch.empty_like(shards[rank])
            work = _reduce_scatter(total, source, group=self.group, async_op=True)
            return Reduction(DeviceTransfer(work), source, [total], size, dtype)
        # A reduce-scatter of a device's backend adds in the dtype that it sends, so 16-bit sums would lose bits. gloo
        # implements it by an all-reduce, which sends twice the bytes.
        if self.downward is None or shards[rank].nbytes <= SMALL:
            received = torch.empty_like(source)
            work = dist.all_to_all_single(received, source, group=self.group, async_op=True)
            transfer = DeviceTransfer(work) if self.downward is None else HostTransfer([work], self.groups)
            return Reduction(transfer, source, received.view(size, -1).unbind(), size, dtype)
        parts = [shards[rank] if other == rank else torch.empty_like(shards[rank]) for other in range(size)]
        return Reduction(self._start_exchange(self.downward, shards, parts), source, parts, size, dtype)

    def start_gather(self, buffer: Tensor, shard: Tensor) -> Transfer:
        """Starts an all-gather that fills ``buffer`` with the ``shard`` of every rank, in rank order.

        Args:
            buffer: 1-D, any dtype; its length is a multiple of world_size.
            shard: this rank's slice of ``buffer``, a view of its memory.
        """
        self.groups.count()
        if self.downward is None:
            return DeviceTransfer(all_gather(buffer, shard, group=self.group, async_op=True))
        # In gloo's ring of more than two ranks, no rank both sends to a peer and receives from that peer, so there is
        # no gain from a second connection.
        if self.world_size > 2 or shard.nbytes <= SMALL:
            return HostTransfer([all_gather(buffer, shard, group=self.group, async_op=True)], self.groups)
        return self._start_exchange(self.downward, [shard, shard], buffer.view(2, -1).unbind())

    def _start_exchange(
        self, downward: dist.ProcessGroup, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]
    ) -> HostTransfer:
        """Starts sending ``outgoing[rank]`` to each other rank and receiving ``incoming[rank]`` from it.

        All tensors are 1-D and equally long. With gloo a rank announces that it is ready to receive on the connection
        on which it also sends, and gloo's all-to-all begins with the sends. The announcement then often waits behind
        data, and two ranks send one after the other. Each group has its own connections, so one group for each
        direction keeps both directions of a link busy.
        """
        rank, works = dist.get_rank(self.group), list[dist.Work]()
        for distance in range(1, self.world_size):
            works += _start_messages(self.group, outgoing, rank + distance, incoming, rank - distance)
            works += _start_messages(downward, outgoing, rank - distance, incoming, rank + distance)
        return HostTransfer(works, self.groups)

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """Overwrites ``buffer``, of any shape and dtype, with the one of rank ``source``, and waits for that."""
        self.groups.count()
        with self.groups.using():
            dist.broadcast(buffer, group=self.group, group_src=source)


def _start_messages(
    group: dist.ProcessGroup, outgoing: Sequence[Tensor], to: int, incoming: Sequence[Tensor], origin: int
) -> list[dist.Work]:
    """Starts sending ``outgoing[to]`` and receiving ``incoming[origin]``; skips a rank that the group does not have."""
    ranks, nothing = range(dist.get_world_size(group)), outgoing[0][:0]
    sent = outgoing[to] if to in ranks else nothing
    received = incoming[origin] if origin in ranks else nothing
    works, most = [], MESSAGE // nothing.element_size()
    for first in range(0, len(outgoing[0]), most):
        out, into = sent[first : first + most], received[first : first + most]
        gives, takes = ([len(part) * (rank == at) for rank in ranks] for part, at in ((out, to), (into, origin)))
        works.append(dist.all_to_all_single(into, out, takes, gives, group=group, async_op=True))
    return works
