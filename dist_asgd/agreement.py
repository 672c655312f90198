"""Keeps ranks of one mind: the same error on every rank, and no silent difference between them.

It all runs over one small gloo group of host tensors, so it never waits for a device or queues behind gradients.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

_ERRORS: dict[str, type[Exception]] = {"TypeError": TypeError, "ValueError": ValueError}


Facts = list[tuple[str, str]]  # (name, value)


class Agreement:
    """Exchanges between the ranks of a process group. Every method is collective; with one rank it does nothing.

    Args:
        group: the ranks that must agree; None for one process without torch.distributed.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if group is not None and dist.get_rank(group) < 0:
            raise ValueError("this rank is not in process_group; only its members build the optimizer")
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world_size = 1 if group is None else dist.get_world_size(group)
        self.group: dist.ProcessGroup | None = None
        if group is not None and self.world_size > 1:
            self.group = group_of_its_own(group, "gloo")

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Runs the block on every rank; if it raised anywhere, every rank raises the same error."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.maximum([], error)

    def maximum(self, values: Sequence[int], error: Exception | None = None) -> list[int]:
        """The element-wise maximum of ``values`` (int64, as many on each rank) over the ranks.

        Raises on every rank, in the place of a result, where any rank brings an ``error``.
        """
        if self.group is None:
            if error is not None:
                raise error
            return list(values)
        vector = torch.tensor([error is not None, *values], dtype=torch.int64)
        dist.all_reduce(vector, dist.ReduceOp.MAX, group=self.group)
        failed, *result = vector.tolist()
        if failed:
            self._raise_together(error)
        return result

    def union(self, flags: Sequence[bool]) -> list[bool]:
        """Which of the flags are set on any rank."""
        if self.group is None:
            return list(flags)
        vector = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(vector, dist.ReduceOp.MAX, group=self.group)
        return vector.bool().tolist()

    def require_equal(self, what: str, facts: Facts) -> None:
        """Raises ``ValueError`` on every rank unless all ranks bring the same ``facts`` in the same order."""
        code = fingerprint(facts)
        high, minus_low = self.maximum([code, -code])
        if high != -minus_low:
            raise ValueError(_first_difference(what, self._gather(facts)))

    def _raise_together(self, error: Exception | None) -> None:
        mine = None if error is None else (type(error).__name__, str(error))
        everyone = self._gather(mine)
        failures = [(rank, *failure) for rank, failure in enumerate(everyone) if failure is not None]
        kind = _ERRORS.get(failures[0][1], RuntimeError)
        ranks_of: dict[str, list[int]] = {}
        for rank, _, message in failures:
            ranks_of.setdefault(message, []).append(rank)
        raise kind("; ".join(f"{self._name(ranks)}: {message}" for message, ranks in ranks_of.items())) from error

    def _name(self, ranks: Sequence[int]) -> str:
        if len(ranks) == self.world_size:
            return f"every rank (rank 0 to rank {ranks[-1]})"
        return "rank " + ", ".join(map(str, ranks))

    def _gather(self, item: object) -> list:
        everyone: list = [None] * self.world_size
        dist.all_gather_object(everyone, item, group=self.group)
        return everyone


def group_of_its_own(group: dist.ProcessGroup | None, backend: str | None = None) -> dist.ProcessGroup:
    """Another group of the ranks of ``group`` (None: the default group), by default of its backends. Collective.

    Collectives of one group are matched by their order. Those that backward starts follow the order in which gradients
    come, which is ours alone: other optimizers, DDP or SyncBatchNorm on the same ranks have theirs. The group lives
    until ``torch.distributed.destroy_process_group()``.
    """
    ranks = dist.get_process_group_ranks(group)
    # torch names a group that only its members make by counting the groups that they are in: those counts must agree. A
    # group of all ranks is made by all and needs no such luck.
    members_only = len(ranks) < dist.get_world_size()
    return dist.new_group(
        ranks, backend=backend or dist.get_backend_config(group), use_local_synchronization=members_only
    )


def fingerprint(facts: object) -> int:
    """A number below 2**32 that differs, almost surely, where ``repr(facts)`` differs."""
    return zlib.crc32(repr(facts).encode())


def _first_difference(what: str, everyone: Sequence[Facts]) -> str:
    for position in range(max(map(len, everyone))):
        entries = [facts[position] if position < len(facts) else ("nothing", "") for facts in everyone]
        if len(set(entries)) > 1:
            other = next(rank for rank, entry in enumerate(entries) if entry != entries[0])
            found = " and ".join(" = ".join(filter(None, entries[rank])) + f" on rank {rank}" for rank in (0, other))
            return f"ranks disagree on {what}: {found}. They must be the same on every rank"
    return f"ranks disagree on {what}"
