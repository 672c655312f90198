"""Agreement between ranks: an error of one rank becomes an error of every rank, and differences are found.

Every exchange uses one small gloo group of host tensors, so it never waits for a device or queues behind gradients. All
agreements of the same ranks share that group: ranks in calls of different objects meet there and are told so.
"""

from __future__ import annotations

import contextlib
import math
import traceback
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dist_asgd.comm.objects import all_gather_object, broadcast_object, gather_object, scatter_object
from dist_asgd.comm.process_groups import SeparateGroups, SharedGroups, check_group
from dist_asgd.comm.roll_call import (
    ELSEWHERE,
    MAX_VALUES,
    DifferentOperations,
    Exchange,
    RankMissing,
    place_of_this_process,
)
from dist_asgd.comm.store import StoreClient

_ERRORS: dict[str, type[Exception]] = {"TypeError": TypeError, "ValueError": ValueError}
ErrorClass = TypeVar("ErrorClass", bound=type[Exception])


def same_on_all_ranks(kind: ErrorClass) -> ErrorClass:
    """Declares, as a decorator, that an error of this class on one rank becomes one of this class on all ranks.

    The class must be constructible from a message.
    """
    _ERRORS[kind.__name__] = kind
    return kind


Facts = list[tuple[str, str]]  # (name, value)


FAILED = 1 << 60  # added to the number of an exchange by a rank that has an error


class Agreement:
    """Exchanges small facts and errors between the ranks of a process group.

    The constructor and every method are collective: every rank of ``group`` must call them in the same order. With one
    rank nothing is sent.

    A rank that does not come, or that is in another call, is named on every rank; see [Note: roll call] in
    ``comm/roll_call.py``. An exchange takes at most the timeout of ``group`` and some seconds.

    Args:
        group: the ranks that must agree; None for one process without torch.distributed.
        caller: for messages: the class whose methods the operations are, such as ``"Checkpointer"``, or the function
            that is the only one, such as ``"dist_asgd.save()"``.

    Attributes:
        places: host and process of each rank of ``group``, in words.

    Raises:
        TypeError: ``group`` is no process group.
        ValueError: this rank is not a member of ``group``.
        RankMissing: a rank does not come within the timeout of ``group``.
    """

    def __init__(self, group: dist.ProcessGroup | None, caller: str) -> None:
        check_group(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world_size = 1 if group is None else dist.get_world_size(group)
        self.ranks = [] if group is None else dist.get_process_group_ranks(group)  # global rank of each group rank
        self._caller = self._call = caller
        self._groups: SharedGroups | None = None
        self._parent = group if self.world_size > 1 else None
        self._number = 0  # tells apart the agreements that share the group; equal on every rank
        if self._parent is not None:
            self._join(self._parent)

    def _join(self, parent: dist.ProcessGroup) -> None:
        opening = self._caller if self._caller.endswith(")") else f"{self._caller}()"
        for renew in (False, True):
            groups = self._groups = SharedGroups.of(parent, opening, renew=renew)
            try:
                (former,) = self.maximum(opening, [groups.agreements])
                if former == 0:
                    for rank, place in zip(self.ranks, self.gather(place_of_this_process()), strict=True):
                        groups.roll_call.places[rank] = place
                self._number = groups.agreements = former + 1
                return
            except RuntimeError as error:
                # Another error is one of gloo: a collective of the group has failed before, such as by a timeout, which
                # closes its connections for good, on all ranks.
                if renew or isinstance(error, DifferentOperations | RankMissing):
                    raise

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The gloo group of the exchanges; None for one rank."""
        return None if self._groups is None else self._groups.host

    @property
    def store(self) -> StoreClient | None:
        """Access to the key-value store of torch.distributed; None for one rank."""
        return None if self._groups is None else self._groups.roll_call.client

    @property
    def places(self) -> list[str]:
        known = {} if self._groups is None else self._groups.roll_call.places
        return [known.get(rank, "") for rank in self.ranks]

    @property
    def seconds(self) -> float:
        """Timeout of the exchanges; ``inf`` for one rank."""
        return math.inf if self._groups is None else self._groups.seconds

    @contextlib.contextmanager
    def exchange(self) -> Iterator[Exchange | None]:
        """Names the ranks that do not come to the exchange of the block on ``group``. Collective.

        Raises:
            RankMissing: a rank does not come within the timeout.
        """
        if self._groups is None:
            yield None
        else:
            with self._groups.exchange(self._call) as exchange:
                yield exchange

    def _still_in(self, exchange: Exchange | None) -> contextlib.AbstractContextManager[None]:
        """Names the ranks that do not come to what the block does for ``exchange``, which was begun before."""
        if self._groups is None or exchange is None:
            return contextlib.nullcontext()
        return self._groups.roll_call.waiting(exchange)

    def note(self, operation: str) -> None:
        """Records, for messages of other ranks, a call that sends nothing. Every rank must make it."""
        if self._groups is not None:
            self._groups.note(self._named(operation))

    def _named(self, operation: str) -> str:
        """Returns the user's call with its class."""
        if self._caller.endswith(")"):
            return self._caller
        return operation if operation.startswith(self._caller) else f"{self._caller}.{operation}"

    def separate_groups(self) -> SeparateGroups | None:
        """Returns process groups for collectives with an order of their own; None for one rank. Collective."""
        if self._groups is None or self._parent is None:
            return None
        return self._groups.take(self._parent, self.gather(self._groups.free()))

    @contextlib.contextmanager
    def together(self, operation: str) -> Iterator[None]:
        """Runs the block on every rank; if it raises on any rank, every rank raises an error that names that rank.

        A ``TypeError``, a ``ValueError`` and an error of a class with ``same_on_all_ranks`` keep their type on all
        ranks, if the lowest failing rank raised it; any other exception becomes a ``RuntimeError``. A rank that is
        interrupted (``KeyboardInterrupt``, ``SystemExit``) raises that again itself, and the other ranks raise a
        ``RuntimeError`` that says so.

        Args:
            operation: the public call that runs the block, such as ``"save()"``.
        """
        own: BaseException | None = None
        try:
            yield
        except StopIteration as error:  # contextlib swallows an error raised here whose cause is the StopIteration
            own = RuntimeError(error_text(error)).with_traceback(error.__traceback__)
        except RankMissing:  # so no exchange would be complete, and every rank is told by the one that failed
            raise
        except BaseException as error:
            own = error
        try:
            self.maximum(operation, error=own)
        except Exception as error:
            if own is not None and not isinstance(own, Exception):
                raise own from None
            if own is None or own in (error, error.__cause__):
                raise
            raise RuntimeError(f"{error_text(own)}. Nor could ranks tell one another so: {error}") from own

    def maximum(self, operation: str, values: Sequence[int] = (), error: BaseException | None = None) -> list[int]:
        """Returns the element-wise maximum of ``values`` over the ranks.

        Args:
            operation: the public call that the rank is in, such as ``"step()"``.
            values: at most ``MAX_VALUES`` integers that fit into int64, equally many on every rank.
            error: what went wrong on this rank, or None.

        Raises:
            DifferentOperations: on every rank, if ranks are in different operations.
            RankMissing: on every rank, if a rank does not come within the timeout.
            TypeError, ValueError, RuntimeError: on every rank, if any rank has an ``error``; see ``together``.
        """
        if self._groups is None:
            if error is not None:
                raise error
            return list(values)
        self._call = self._named(operation)
        # The length is the same for every operation: ranks in different operations must meet here to be told so.
        code = fingerprint((operation, self._number))
        padding = [0] * (MAX_VALUES - len(values))
        with self._groups.exchange(self._call) as exchange:
            news = exchange.number + (FAILED if error is not None else 0)
            vector = torch.tensor([code, -code, news, *values, *padding], dtype=torch.int64, device="cpu")
            work = dist.all_reduce(vector, dist.ReduceOp.MAX, group=self.group, async_op=True)
            self._groups.complete(work, exchange)
        high, minus_low, news, *result = vector.tolist()
        failed, number = divmod(news, FAILED)
        if number != exchange.number:  # some rank has left out a call that sends nothing
            self._groups.roll_call.renumber(exchange, number)
        if high != -minus_low:
            self._raise_different(self._groups, exchange, result, elsewhere=high == ELSEWHERE)
        if failed:
            self._raise_everywhere(operation, error)
        return result[: len(values)]

    def union(self, flags: Sequence[bool]) -> list[bool]:
        """Returns, for each flag, whether it is set on any rank. Every rank gives equally many."""
        if self.group is None:
            return list(flags)
        vector = torch.tensor(flags, dtype=torch.uint8, device="cpu")
        with self.exchange():
            dist.all_reduce(vector, dist.ReduceOp.MAX, group=self.group)
        return vector.bool().tolist()

    def gather(self, item: Any) -> list[Any]:
        """Returns the ``item`` of every rank, in rank order, on every rank. Items must be picklable."""
        with self.exchange():
            return all_gather_object(item, self.group)

    def scatter(self, items: Sequence[Any]) -> Any:
        """Returns to each rank its element of rank 0's ``items``. Items must be picklable."""
        with self.exchange():
            return scatter_object(items, self.group)

    def broadcast(self, item: Any) -> Any:
        """Returns rank 0's ``item`` on every rank. It must be picklable."""
        with self.exchange():
            return broadcast_object(item, self.group)

    def collect(
        self, item: Any, tensors: Sequence[torch.Tensor], to: int = 0
    ) -> Iterator[tuple[Any, Sequence[torch.Tensor]]]:
        """Yields, on rank ``to``, the item and the tensors of one rank after the other, in rank order.

        On other ranks it yields nothing, but sends while it is iterated over: they must exhaust it too.

        Args:
            item: any picklable object.
            tensors: 1-D, on the CPU, of any dtype. Ranks may give different numbers and sizes.
            to: the rank that collects, the same on every rank.
        """
        with self.exchange() as exchange:
            everyone = gather_object((item, [(tensor.dtype, tensor.numel()) for tensor in tensors]), self.group, to)
            for tensor in tensors if self.rank != to else []:
                if tensor.numel():
                    dist.send(tensor.contiguous().view(torch.uint8), group=self.group, group_dst=to)
        for rank, (other, kinds) in enumerate(everyone):
            if rank == to:
                yield item, tensors
                continue
            received = [torch.empty(numel, dtype=dtype, device="cpu") for dtype, numel in kinds]
            with self._still_in(exchange):
                for tensor in received:
                    if tensor.numel():
                        dist.recv(tensor.view(torch.uint8), group=self.group, group_src=rank)
            yield other, received

    def require_equal(self, what: str, facts: Facts) -> None:
        """Raises ``ValueError`` on every rank unless all ranks give equal ``facts`` in the same order.

        Args:
            what: names the facts in the error message.
        """
        code = fingerprint(facts)
        high, minus_low = self.maximum(what, [code, -code])
        if high != -minus_low:
            raise ValueError(_first_difference(what, self.gather(facts)))

    def _raise_different(
        self, groups: SharedGroups, exchange: Exchange, values: Sequence[int], elsewhere: bool
    ) -> None:
        """Raises ``DifferentOperations``.

        Args:
            elsewhere: whether a rank has joined the exchange from a call of another process group.
        """
        if elsewhere:
            groups.roll_call.raise_verdict(exchange)
            raise DifferentOperations({exchange.ranks[self.rank]: exchange.call})
        everyone = self.gather((exchange.call, self._number))
        names = {name for name, _ in everyone}
        calls = {}
        for rank, (name, number) in zip(self.ranks, everyone, strict=True):
            of = f" of object {number} in the order of construction" if len(names) < len(set(everyone)) else ""
            calls[rank] = name + of
        if len({number for _, number in everyone}) > 1:
            values = [0] * MAX_VALUES  # values of different objects cannot be compared
        raise DifferentOperations(calls, values)

    def _raise_everywhere(self, operation: str, error: BaseException | None) -> None:
        mine = None if error is None else (type(error).__name__, error_text(error))
        if mine is not None and not isinstance(error, Exception):
            mine = (mine[0], f"{operation} was interrupted by {mine[0]}")
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


def error_text(error: BaseException) -> str:
    """Returns the message of ``error``; if that is empty, the name of its type and the line that raised it."""
    text = str(error)
    if text.strip():
        return text
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (raised by `{frames[-1].line}` in {frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return type(error).__name__ + place


def fingerprint(facts: object) -> int:
    """Returns the CRC-32 of ``repr(facts)``: an integer in [0, 2**32) by which ranks compare facts."""
    return zlib.crc32(repr(facts).encode())


def _first_difference(what: str, everyone: Sequence[Facts]) -> str:
    for position in range(max(map(len, everyone))):
        entries = [facts[position] if position < len(facts) else ("nothing", "") for facts in everyone]
        if len(set(entries)) > 1:
            other = next(rank for rank, entry in enumerate(entries) if entry != entries[0])
            found = " and ".join(" = ".join(filter(None, entries[rank])) + f" on rank {rank}" for rank in (0, other))
            return f"ranks disagree on {what}: {found}. They must be the same on every rank"
    return f"ranks disagree on {what}"
