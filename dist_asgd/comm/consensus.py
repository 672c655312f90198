"""Keeps ranks of one mind: the same error on every rank, and no silent difference between them.

It all runs over one small gloo group of host tensors, so it never waits for a device or queues behind gradients.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from dist_asgd.comm.process_groups import _check_group, default_group, group_of_its_own

_ERRORS: dict[str, type[Exception]] = {"TypeError": TypeError, "ValueError": ValueError}


Facts = list[tuple[str, str]]  # (name, value)


MAX_VALUES = 7  # of one exchange


class DifferentOperations(RuntimeError):
    """Ranks met in different collective calls. Raised on every rank, with the ``values`` of that exchange."""

    def __init__(self, message: str, values: Sequence[int]) -> None:
        super().__init__(message)
        self.values = values


class Agreement:
    """Exchanges between the ranks of a process group. Every method is collective; with one rank it does nothing.

    Args:
        group: the ranks that must agree; None for one process without torch.distributed.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        _check_group(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world_size = 1 if group is None else dist.get_world_size(group)
        self.ranks = [] if group is None else dist.get_process_group_ranks(group)  # in the numbers of all ranks
        self.group = group_of_its_own(group, "gloo")

    @contextlib.contextmanager
    def together(self, operation: str) -> Iterator[None]:
        """Runs the block on every rank; if it raised anywhere, every rank raises the same error."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.maximum(operation, error=error)

    def maximum(self, operation: str, values: Sequence[int] = (), error: Exception | None = None) -> list[int]:
        """The element-wise maximum of up to ``MAX_VALUES`` ``values`` (int64, as many on each rank) over the ranks.

        Raises on every rank, in the place of a result, where any rank brings an ``error`` or is in another
        ``operation``: what the user has called, in words.
        """
        if self.group is None:
            if error is not None:
                raise error
            return list(values)
        # Of one length, whatever it carries: ranks in different operations must meet here, or none could say so.
        code = fingerprint(operation)
        padding = [0] * (MAX_VALUES - len(values))
        vector = torch.tensor([code, -code, error is not None, *values, *padding], dtype=torch.int64, device="cpu")
        dist.all_reduce(vector, dist.ReduceOp.MAX, group=self.group)
        high, minus_low, failed, *result = vector.tolist()
        if high != -minus_low:
            self._raise_different(operation, result)
        if failed:
            self._raise_together(error)
        return result[: len(values)]

    def union(self, flags: Sequence[bool]) -> list[bool]:
        """Which of the flags are set on any rank."""
        if self.group is None:
            return list(flags)
        vector = torch.tensor(flags, dtype=torch.uint8, device="cpu")
        dist.all_reduce(vector, dist.ReduceOp.MAX, group=self.group)
        return vector.bool().tolist()

    def gather(self, item: Any) -> list[Any]:
        """The ``item`` (anything that can be pickled) of every rank, by rank."""
        everyone: list[Any] = [item] * self.world_size
        if self.group is not None:
            dist.all_gather_object(everyone, item, group=self.group)
        return everyone

    def collect(self, item: Any, tensors: Sequence[torch.Tensor]) -> Iterator[tuple[Any, list[torch.Tensor]]]:
        """On rank 0 what each rank brings, one rank after the other; on the others nothing, but they must iterate too.

        Args:
            item: anything that can be pickled.
            tensors: 1-D, on the CPU.
        """
        if self.rank == 0:
            yield item, list(tensors)
        if self.group is None:
            return
        everyone: list[Any] = [None] * self.world_size
        kinds = [(tensor.dtype, tensor.numel()) for tensor in tensors]
        dist.gather_object((item, kinds), everyone if self.rank == 0 else None, group=self.group, group_dst=0)
        for tensor in tensors if self.rank else []:
            if tensor.numel():
                dist.send(tensor.contiguous().view(torch.uint8), group=self.group, group_dst=0)
        for rank in range(1, self.world_size) if self.rank == 0 else []:
            other, kinds = everyone[rank]
            received = [torch.empty(numel, dtype=dtype, device="cpu") for dtype, numel in kinds]
            for tensor in received:
                if tensor.numel():
                    dist.recv(tensor.view(torch.uint8), group=self.group, group_src=rank)
            yield other, received

    def require_equal(self, what: str, facts: Facts) -> None:
        """Raises ``ValueError`` on every rank unless all ranks bring the same ``facts`` in the same order."""
        code = fingerprint(facts)
        high, minus_low = self.maximum(what, [code, -code])
        if high != -minus_low:
            raise ValueError(_first_difference(what, self.gather(facts)))

    def _raise_different(self, operation: str, values: Sequence[int]) -> None:
        ranks_in: dict[str, list[int]] = {}
        for rank, name in enumerate(self.gather(operation)):
            ranks_in.setdefault(name, []).append(rank)
        found = "; ".join(f"{self._name(ranks)}: {name}" for name, ranks in ranks_in.items())
        raise DifferentOperations(
            f"ranks are in different operations of the optimizer: {found}. These are collective: every rank must call "
            "them, in the same order and with the same arguments (not under `if rank == 0:`)",
            values,
        )

    def _raise_together(self, error: Exception | None) -> None:
        mine = None if error is None else (type(error).__name__, str(error))
        everyone = self.gather(mine)
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


@contextlib.contextmanager
def agreement_of_all() -> Iterator[Agreement]:
    """Of all ranks, for as long as the block takes; collective."""
    agreement = Agreement(default_group(None))
    try:
        yield agreement
    finally:
        if agreement.group is not None:
            dist.destroy_process_group(agreement.group)


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
