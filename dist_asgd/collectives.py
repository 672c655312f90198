"""The two collectives of a step, over flat buffers: reduce-scatter of gradients and all-gather of parameters."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 gave the flat collectives new names and deprecated the old ones.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

POLL = 0.0002  # seconds


def completes_within(work: dist.Work, seconds: float) -> bool:
    """Whether ``work`` is complete, on its device too, at the latest after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not work.is_completed():
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL)
    return True


@dataclass(frozen=True, slots=True)
class Reduction:
    """A reduce-scatter under way. Keeps the buffers of the wire alive until ``finish``."""

    work: dist.Work
    source: Tensor  # 1-D, world_size shards: this rank's gradients
    received: Tensor  # gloo: 1-D, this rank's shard from each rank. nccl: 1-D, the sum of this rank's shard
    world_size: int
    dtype: torch.dtype  # of the result

    def finish(self) -> Tensor:
        """Waits, and returns the mean of this rank's shard over the ranks, 1-D.

        Shards that came apart are added in rank order in ``dtype``, so the bits of the mean depend neither on the
        bucket layout nor on timing.
        """
        self.work.wait()
        parts = self.received.view(-1, len(self.source) // self.world_size)
        total = parts[0].to(self.dtype, copy=True)
        for part in parts[1:]:
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
        if self._backend() == "gloo":
            # gloo's reduce-scatter is an all-reduce inside, which sends twice the bytes of this exchange of shards.
            received = torch.empty_like(source)
            work = dist.all_to_all_single(received, source, group=self.group, async_op=True)
        else:
            received = source.new_empty(len(source) // self.world_size)
            work = _reduce_scatter(received, source, group=self.group, async_op=True)
        return Reduction(work, source, received, self.world_size, dtype)

    def start_gather(self, buffer: Tensor, shard: Tensor) -> dist.Work:
        """Starts filling ``buffer`` (1-D) with the ``shard`` of every rank; ``shard`` is this rank's part of it."""
        return all_gather(buffer, shard, group=self.group, async_op=True)

    def broadcast(self, buffer: Tensor) -> None:
        """Rank 0's ``buffer`` to every rank."""
        dist.broadcast(buffer, group=self.group, group_src=0)

    def _backend(self) -> str:
        config = dict(part.split(":") for part in dist.get_backend_config(self.group).split(",") if ":" in part)
        return config.get(self.device_type, dist.get_backend(self.group))
