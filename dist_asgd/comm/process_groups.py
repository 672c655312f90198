"""Makes the process groups that the optimizer and the checkpoints use beside those of the user."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from dist_asgd._torch_private import timeout_of
from dist_asgd.comm.roll_call import ELSEWHERE, MAX_VALUES, Exchange, RankMissing, RollCall


def default_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Returns ``group``, or the group of all ranks if it is None, or None if torch.distributed is not initialized.

    Warns when torchrun started several processes and torch.distributed is not initialized.
    """
    if group is not None or dist.is_initialized():
        return dist.group.WORLD if group is None else group
    count = os.environ.get("WORLD_SIZE", "1")
    if dist.is_torchelastic_launched() and count != "1":
        warnings.warn(
            f"torchrun started {count} processes, but torch.distributed is not initialized: this optimizer trains this "
            "process alone. Call torch.distributed.init_process_group() before its first step",
            stacklevel=3,
        )
    return None


def check_group(group: object) -> None:
    """Raises ``ValueError`` if this rank is no member of ``group``, ``TypeError`` if it is neither a group nor None."""
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this rank is not in process_group; only its members build the optimizer")
    if not (group is None or isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup or None, got {group!r}")


class SharedGroups:
    """Process groups beside one group of the user, shared by all objects of this package on that group.

    torch keeps a process group, with its sockets and threads, until ``torch.distributed.destroy_process_group()``. So
    none is made for each object: exchanges of all objects share ``host``, and the groups of an optimizer that is gone
    are taken over by the next one.

    Args:
        group: the user's group. Construction is collective among its ranks.
        call: the user's call.
        generation: number of instances that ``group`` had before.

    Attributes:
        host: gloo group of all ranks, for exchanges that every rank makes in the same order.
        agreements: number of objects that have used ``host``.
        roll_call: finds the ranks that keep an exchange waiting.
        seconds: the timeout of ``group``.

    Raises:
        RankMissing: a rank of ``group`` does not come within the timeout.
        DifferentOperations: ranks of ``group`` wait for one another in other calls.
    """

    _of_group: ClassVar[weakref.WeakKeyDictionary[dist.ProcessGroup, SharedGroups]] = weakref.WeakKeyDictionary()

    def __init__(self, group: dist.ProcessGroup, call: str, generation: int = 0) -> None:
        self._ranks = dist.get_process_group_ranks(group)
        self.seconds = seconds_of(group)
        self.roll_call = RollCall.of_world()
        # new_group() waits without naming anybody, so ranks meet before it.
        name = f"{group.group_name}, groups beside it, number {generation}"
        self.roll_call.assemble(Exchange(name, self.roll_call.count(name, call), self._ranks, call, self.seconds))
        self.host = _new_group(group, self._ranks, "gloo")
        self.agreements = 0
        self.generation = generation
        self._broken = False
        self._sets: dict[int, _GroupSet] = {}  # by number, which is the same on every rank
        self.roll_call.joins[self.host.group_name] = functools.partial(_join_elsewhere, self.host)

    @classmethod
    def of(cls, group: dist.ProcessGroup, call: str, *, renew: bool = False) -> SharedGroups:
        """Returns the one instance of ``group``; collective when it is made.

        Args:
            group: the user's group; after ``destroy_process_group()`` there is another one, and so another instance.
            call: the user's call.
            renew: whether to make another instance, as a collective on ``host`` has failed on every rank.
        """
        former = cls._of_group.get(group)
        if former is None or former._broken or renew:
            cls._of_group[group] = cls(group, call, 0 if former is None else former.generation + 1)
        return cls._of_group[group]

    @contextlib.contextmanager
    def exchange(self, call: str) -> Iterator[Exchange]:
        """Counts an exchange on ``host``, which the block makes, and names the ranks that keep it waiting. Collective.

        Args:
            call: the user's call.

        Raises:
            RankMissing: a rank does not come; see ``RollCall.waiting``.
            RuntimeError: an earlier exchange has failed.
        """
        if self._broken:
            raise RuntimeError(
                f"{call}: an earlier exchange between these ranks has failed, so their process group cannot be used "
                "any more. Build optimizers and checkpointers again on every rank, or start the run again"
            )
        exchange = Exchange(self.host.group_name, self.note(call), self._ranks, call, self.seconds)
        try:
            with self.roll_call.waiting(exchange):
                yield exchange
        except RankMissing:
            self._broken = True
            raise

    def note(self, call: str) -> int:
        """Counts a call that every rank makes, and that may send nothing; returns its number."""
        return self.roll_call.count(self.host.group_name, call)

    def complete(self, work: dist.Work, exchange: Exchange) -> None:
        """Waits for ``work``, which ``exchange`` has started; see ``RollCall.complete``."""
        try:
            self.roll_call.complete(work, exchange)
        except BaseException:
            self._broken |= not work.is_completed()  # it would be matched with the next exchange of other ranks
            raise

    def free(self) -> tuple[int, dict[int, int]]:
        """Returns the number that a new set would get on this rank, and the uses of each set that is free on it."""
        return len(self._sets), {number: each.uses for number, each in self._sets.items() if each.is_free()}

    def take(self, group: dist.ProcessGroup, everyone: Sequence[tuple[int, dict[int, int]]]) -> SeparateGroups:
        """Returns the first set that is free and used equally often on every rank, or a new set.

        Garbage is collected at different times on the ranks, so a set that is free on one may be in use on another.
        Where ranks have used a set differently often, a collective of one rank is still waiting for the others.

        Args:
            group: the user's group.
            everyone: the result of ``free()`` on each rank.
        """
        first, *others = [sets for _, sets in everyone]
        usable = [number for number, uses in first.items() if all(other.get(number) == uses for other in others)]
        number = min(usable, default=max(count for count, _ in everyone))
        return SeparateGroups(group, self._sets.setdefault(number, _GroupSet()), self.roll_call)


@dataclass
class _GroupSet:
    """Process groups for one optimizer after another, as this rank sees them."""

    made: dict[tuple[tuple[int, ...], str | None, str], dist.ProcessGroup] = field(default_factory=dict)
    uses: int = 0  # collectives that this rank has started
    broken: bool = False  # whether a collective or the making of a group has failed
    user: Callable[[], object] = lambda: None  # weak reference to the SeparateGroups that uses the set

    def is_free(self) -> bool:
        return not self.broken and self.user() is None


class SeparateGroups:
    """Process groups of one optimizer, whose collectives have an order of their own.

    Collectives of one group are matched by their order. Backward starts the optimizer's collectives in the order in
    which gradients become ready, and other users of the ranks (optimizers, DDP, SyncBatchNorm) have another order. So
    no two optimizers that are alive share a group. Whoever starts collectives holds this object; when the last holder
    is gone, another optimizer may take over the groups.
    """

    def __init__(self, group: dist.ProcessGroup, groups: _GroupSet, roll_call: RollCall) -> None:
        self._group, self._set, self._roll_call = group, groups, roll_call
        self._ranks = dist.get_process_group_ranks(group)
        self._seconds = seconds_of(group)
        groups.user = weakref.ref(self)

    def of(self, ranks: Sequence[int], backend: str | None = None, purpose: str = "") -> dist.ProcessGroup:
        """Returns a process group of ``ranks``, with the timeout of the user's group. Collective among ``ranks``.

        Args:
            ranks: global ranks, all of them members of the user's group.
            backend: as ``torch.distributed.new_group`` takes it; None for the backends of the user's group.
            purpose: tells groups apart that have the same ranks and backend.
        """
        key = (tuple(ranks), backend, purpose)
        if key not in self._set.made:
            with self.using():
                self._set.made[key] = _new_group(self._group, ranks, backend)
        return self._set.made[key]

    def count(self) -> None:
        """Counts a collective that this rank is about to start."""
        self._set.uses += 1

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """Keeps the groups from later optimizers if the block, which starts or awaits a collective, raises.

        Raises:
            RankMissing: the collective failed, and a rank of the user's group does not answer.
        """
        try:
            with self._roll_call.waiting(Exchange("", 0, self._ranks, self._roll_call.last_call, self._seconds)):
                yield
        except BaseException:
            self._set.broken = True
            raise


def seconds_of(group: dist.ProcessGroup) -> float:
    """Returns the timeout of the collectives of ``group``."""
    return (timeout_of(group) or default_pg_timeout).total_seconds()


def _join_elsewhere(host: dist.ProcessGroup) -> dist.Work:
    """Starts the exchange of ``Agreement.maximum`` for a rank that is in a call of another group."""
    vector = torch.tensor([ELSEWHERE, ELSEWHERE, *[0] * (MAX_VALUES + 1)], dtype=torch.int64, device="cpu")
    return dist.all_reduce(vector, dist.ReduceOp.MAX, group=host, async_op=True)


def _new_group(group: dist.ProcessGroup, ranks: Sequence[int], backend: str | None) -> dist.ProcessGroup:
    # torch names a group that only its members make by counting the groups that they are in: those counts must agree. A
    # group of all ranks is made by all of them, so its name depends on no such count.
    members_only = len(ranks) < dist.get_world_size()
    try:
        with _without_splits() if members_only else contextlib.nullcontext():
            return dist.new_group(
                list(ranks),
                timeout=timeout_of(group),
                backend=backend or dist.get_backend_config(group),
                use_local_synchronization=members_only,
            )
    except RuntimeError as error:
        if backend != "gloo":
            raise
        raise RuntimeError(
            f"gloo could not connect {len(ranks)} ranks, which exchange their checks in a gloo group of their own, "
            f"whatever the backend of process_group: {error}. If gloo found no network interface or took the wrong "
            "one, set the environment variable GLOO_SOCKET_IFNAME on every rank to the interface that connects the "
            "hosts"
        ) from error


@contextlib.contextmanager
def _without_splits() -> Iterator[None]:
    """Keeps torch, in the block, from making groups by splitting the communicator of all ranks.

    ``init_process_group(device_id=...)`` binds a device to the group of all ranks. torch then makes NCCL groups by
    ``ncclCommSplit``, which waits for every rank, also for ranks that are not in the new group and do not make it.
    """
    world: Any = dist.group.WORLD
    device, world.bound_device_id = world.bound_device_id, None
    try:
        yield
    finally:
        world.bound_device_id = device
