"""Names the ranks that keep others waiting: those that do not answer, are late, or are in another collective call.

[Note: roll call] An exchange that is complete soon costs nothing here but a record in memory of where this rank is. A
rank whose exchange takes longer than ``SLOW_SECONDS``, or fails, calls the roll: it writes a question into the
key-value store of torch.distributed. A daemon thread of each process looks for questions once a second and answers with
the rank's record. Three conclusions are drawn:

- Different calls. An exchange of a process group has a number, which is equal on all of its ranks. If another rank
  gave the number to another call, or waits, maybe through further ranks, for an exchange that this rank cannot reach,
  nobody can go on. All ranks concerned raise at once. A rank first joins the exchanges in which the others wait, so
  that all of them end and the process groups stay usable.
- A rank does not answer when an exchange has failed or timed out: it was stopped, has ended, or is out of reach.
- A rank answers, and has not come to an exchange that timed out.

The first rank that concludes writes its verdict into the store, and the others raise the same one.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import ClassVar, NoReturn

import torch.distributed as dist

from dist_asgd._torch_private import default_store
from dist_asgd.comm.store import StoreClient, StoreUnresponsive

SLOW_SECONDS = 2.0  # after which a rank looks into an exchange that is not complete
LISTEN_SECONDS = 1.0  # between two looks for questions of other ranks
ANSWER_SECONDS = 4.0  # within which a rank that runs answers, and so does the store
POLL_SECONDS = 0.1  # between two looks for an answer
TURN_SECONDS = 0.25  # by which each rank asks later than the one before it, as one question serves all
MAX_TURNS = 20
KEPT_CALLS = 8  # the latest calls of a process group that a rank remembers

ELSEWHERE = 1 << 40  # code, above those of all calls, of a rank that joins the exchange of a call that it is not in
MAX_VALUES = 7  # the most integers that one call of Agreement.maximum compares

PREFIX = "roll call"  # of the keys in the store


class RankMissing(RuntimeError):
    """Raised on every rank that waits for a rank that does not come; names the rank and its host."""


class DifferentOperations(RuntimeError):
    """Raised on every rank when ranks meet, or wait for one another, in different collective calls.

    Attributes:
        values: the element-wise maximum over the ranks of the values given to ``Agreement.maximum``, padded with 0; all
            are 0 where the ranks were in calls of different objects.
    """

    def __init__(self, calls: Mapping[int, str] | str, values: Sequence[int] = (0,) * MAX_VALUES) -> None:
        super().__init__(calls if isinstance(calls, str) else _different(calls))
        self.values = values


@dataclass(frozen=True, slots=True)
class Exchange:
    """An exchange between ranks in which this rank is."""

    group: str  # name of the process group
    number: int  # of the exchange in the group, equal on every rank; 0 where ranks do not count
    ranks: Sequence[int]  # the global ranks of the group
    call: str  # the user's call
    seconds: float  # the timeout of the group


@dataclass(slots=True)
class Record:
    """Where a rank is, and which collective calls it made last."""

    exchange: Exchange | None = None  # in which the rank is
    started: Mapping[str, int] = field(default_factory=dict)  # number of the latest exchange, by process group
    calls: Mapping[str, Sequence[tuple[int, str]]] = field(default_factory=dict)  # the latest ones, by process group
    last_call: str = "none"

    def count(self, group: str, number: int, call: str) -> None:
        """Records that the rank starts exchange ``number`` of a process group."""
        # Another thread reads what is replaced here, and never sees it change.
        kept = self.calls.get(group, ())[1 - KEPT_CALLS :]
        self.calls = {**self.calls, group: (*kept, (number, call))}
        self.started = {**self.started, group: number}
        self.last_call = call

    def has_started(self, exchange: Exchange) -> bool:
        return self.started.get(exchange.group, 0) >= exchange.number or self._is_in(exchange)

    def _is_in(self, exchange: Exchange) -> bool:
        # The number is another one, until ranks compare it, on a rank that has left out a call that sends nothing.
        own = self.exchange
        return own is not None and (own.group, own.call) == (exchange.group, exchange.call)

    def passed(self, exchange: Exchange) -> str | None:
        """Returns the other call that the rank made under the number of ``exchange``, and has left; None if none."""
        own = self.exchange
        has_left = own is None or (own.group, own.number) != (exchange.group, exchange.number)
        found = dict(self.calls.get(exchange.group, ())).get(exchange.number, exchange.call)
        return found if has_left and found != exchange.call and not self._is_in(exchange) else None

    @classmethod
    def from_json(cls, data: bytes) -> tuple[int, Record]:
        """Returns the number of the question that is answered, and the record."""
        question, fields = json.loads(data)
        exchange = fields.pop("exchange")
        return question, cls(exchange and Exchange(**exchange), **fields)

    def to_json(self, question: int) -> str:
        return json.dumps([question, asdict(self)])


class RollCall:
    """The record of this rank, and the way to those of other ranks. There is one for each default process group.

    Attributes:
        places: host and process of ranks, in words, by global rank, as far as they are known.
        joins: starts an exchange that tells the ranks in it that this rank is elsewhere; by name of the process group.
    """

    _of_world: ClassVar[weakref.WeakKeyDictionary[dist.ProcessGroup, RollCall]] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.client = StoreClient(default_store(), self.rank)
        self.places: dict[int, str] = {}
        self.joins: dict[str, Callable[[], dist.Work]] = {}
        self._record, stopped = Record(), threading.Event()
        listener = (self.client, self.rank, self._record, stopped)
        threading.Thread(target=_listen, args=listener, name="dist_asgd roll call", daemon=True).start()
        weakref.finalize(self, stopped.set)

    @classmethod
    def of_world(cls) -> RollCall:
        """Returns the one instance of the default process group."""
        world: dist.ProcessGroup = dist.group.WORLD  # type: ignore[assignment]  # None before init_process_group()
        if world not in cls._of_world:
            cls._of_world[world] = cls()
        return cls._of_world[world]

    # What this rank does ---------------------------------------------------------------------------------------------

    def count(self, group: str, call: str) -> int:
        """Records a call of this rank that counts as an exchange of ``group``; returns the number of the exchange."""
        number = self._record.started.get(group, 0) + 1
        self._record.count(group, number, call)
        return number

    def renumber(self, exchange: Exchange, number: int) -> None:
        """Gives ``exchange``, in which this rank is, the number that all of its ranks have agreed on."""
        self._record.count(exchange.group, number, exchange.call)

    @property
    def last_call(self) -> str:
        """The latest call that was counted."""
        return self._record.last_call

    @contextlib.contextmanager
    def waiting(self, exchange: Exchange) -> Iterator[None]:
        """Records that this rank is in ``exchange`` during the block.

        Raises:
            RankMissing: the block raised ``RuntimeError``, and a rank of the exchange does not answer or was not there
                in time. If every rank answers, the error of the block is raised itself.
        """
        outer, since = self._record.exchange, time.monotonic()
        self._record.exchange = exchange
        try:
            yield
        except (RankMissing, DifferentOperations):
            raise
        except RuntimeError as error:
            in_time = "imed out" not in str(error) and time.monotonic() - since < 0.9 * exchange.seconds
            if missing := self._missing(exchange, in_time):
                raise RankMissing(missing) from error
            raise
        finally:
            self._record.exchange = outer

    def complete(self, work: dist.Work, exchange: Exchange) -> None:
        """Waits for ``work`` inside ``waiting(exchange)``, and looks into it if that takes long.

        Raises:
            DifferentOperations: on every rank concerned; see [Note: roll call].
            RuntimeError: the work failed.
        """
        if not _completes(work, min(SLOW_SECONDS, exchange.seconds / 4)):
            self._look_into(exchange, lambda seconds: _completes(work, seconds))
        work.wait()

    def assemble(self, exchange: Exchange) -> None:
        """Returns when all ranks of ``exchange`` have called this. No process group needs to exist yet.

        Raises:
            RankMissing: ranks do not come within the timeout of the exchange, or the store does not answer.
            DifferentOperations: as for ``complete``.
        """
        key, deadline = f"{PREFIX}/assembled/{exchange.group}", time.monotonic() + exchange.seconds
        with self.waiting(exchange):
            if self.client.add(f"{key}/count", 1, exchange.seconds) >= len(exchange.ranks):
                self.client.set(key, b"", exchange.seconds)

            def is_complete(seconds: float) -> bool:
                end, pause = time.monotonic() + seconds, 0.001
                while not self._has_assembled(key, deadline):
                    if time.monotonic() > end:
                        return False
                    time.sleep(pause)
                    pause = min(2 * pause, POLL_SECONDS)
                return True

            if not is_complete(min(SLOW_SECONDS, exchange.seconds / 4)):
                self._look_into(exchange, is_complete)

    def _has_assembled(self, key: str, deadline: float) -> bool:
        try:
            if self.client.has(key, ANSWER_SECONDS):
                return True
        except StoreUnresponsive:
            if time.monotonic() > deadline:
                raise
        if time.monotonic() > deadline:
            raise RuntimeError("Timed out waiting for other ranks")
        return False

    def name(self, ranks: Sequence[int]) -> str:
        """Returns ``ranks`` in words, each with its host and process."""
        return ", ".join(f"rank {rank} ({self.places.get(rank, 'host unknown')})" for rank in ranks)

    # What it concludes about others ----------------------------------------------------------------------------------

    def _look_into(self, exchange: Exchange, completes: Callable[[float], bool]) -> None:
        """Returns when ``exchange`` is complete or has failed; raises the verdict if there is one.

        Args:
            completes: waits at most a number of seconds; returns whether the exchange is complete or has failed.
        """
        pause, ask_at = SLOW_SECONDS, time.monotonic() + _turn(exchange, self.rank)
        while not completes(min(LISTEN_SECONDS, exchange.seconds / 4)):
            with contextlib.suppress(StoreUnresponsive):
                self._raise_verdict(exchange, completes)
                if time.monotonic() >= ask_at:
                    records = self._ask(exchange.ranks, lambda: completes(0.0))
                    if not completes(0.0):
                        self._find_different_calls(exchange, records)
                        self._raise_verdict(exchange, completes)
                    pause, ask_at = 2 * pause, time.monotonic() + pause

    def _find_different_calls(self, exchange: Exchange, records: Mapping[int, Record]) -> None:
        """Writes a verdict if ranks of ``records`` wait for one another in different calls."""
        passed = {rank: call for rank, record in records.items() if (call := record.passed(exchange)) is not None}
        if passed:
            self._pronounce([exchange], passed | {self.rank: exchange.call})
        elif stuck := _circle(self.rank, records):
            self._pronounce(list(stuck.values()), {rank: wait.call for rank, wait in stuck.items()})

    def _pronounce(self, exchanges: Sequence[Exchange], calls: Mapping[int, str]) -> None:
        groups = sorted({(wait.group, wait.number) for wait in exchanges})
        for wait in exchanges:
            self.client.set_new(_verdict_key(wait), json.dumps([groups, _different(calls)]), ANSWER_SECONDS)

    def _raise_verdict(self, exchange: Exchange, completes: Callable[[float], bool]) -> None:
        if (found := self._await_verdict(exchange, 0.0)) is not None:
            self._obey(exchange, *found, completes)

    def _obey(
        self, exchange: Exchange, groups: Sequence[tuple[str, int]], text: str, completes: Callable[[float], bool]
    ) -> NoReturn:
        """Raises the verdict ``text``; before it, joins the exchanges ``groups`` in which others wait for this rank."""
        if not groups:
            raise RankMissing(text)
        for group, number in groups:
            if group in self.joins and self._record.started.get(group, 0) == number - 1:
                self._record.count(group, number, exchange.call)
                _completes(self.joins[group](), ANSWER_SECONDS)
        if len(groups) > 1:
            completes(ANSWER_SECONDS)
        raise DifferentOperations(text)

    def _missing(self, exchange: Exchange, in_time: bool) -> str | None:
        """Returns who is missing from an ``exchange`` that has failed, in words; None if nobody is.

        Args:
            in_time: whether it failed before the timeout, so that ranks may still be on their way to it.
        """
        try:
            if found := self._await_verdict(exchange, _turn(exchange, self.rank)):
                return found[1]
            records = self._ask(exchange.ranks)
            text = self._silent([rank for rank in exchange.ranks if rank not in records], exchange)
            text = text or (None if in_time else self._late(exchange, records))
            if text and exchange.number:
                self.client.set_new(_verdict_key(exchange), json.dumps([[], text]), ANSWER_SECONDS)
            # A rank that the timeout ended in this exchange, and whose connections closed then, asks at the moment.
            found = self._await_verdict(exchange, 2 * LISTEN_SECONDS if in_time else 0.0)
            return text if found is None else found[1]
        except StoreUnresponsive as error:
            host = f". Rank 0 hosts the store ({self.places[0]}), if torchrun does not" if 0 in self.places else ""
            return f"{exchange.call}: {error}{host}"

    def raise_verdict(self, exchange: Exchange) -> None:
        """Raises what a rank has concluded about ``exchange``, which ended because that rank joined it."""
        with contextlib.suppress(StoreUnresponsive):
            if (found := self._await_verdict(exchange, ANSWER_SECONDS)) is not None:
                self._obey(exchange, *found, lambda seconds: True)

    def _await_verdict(self, exchange: Exchange, seconds: float) -> tuple[list[tuple[str, int]], str] | None:
        """Returns the verdict about ``exchange``, groups and text; None if there is none within ``seconds``."""
        deadline = time.monotonic() + seconds
        while exchange.number:
            if (found := self.client.get(_verdict_key(exchange), ANSWER_SECONDS)) is not None:
                groups, text = json.loads(found)
                return groups, text
            if time.monotonic() >= deadline:
                break
            time.sleep(POLL_SECONDS)
        return None

    def _silent(self, ranks: Sequence[int], exchange: Exchange) -> str | None:
        if not ranks:
            return None
        do, it = ("do", "they were stopped, have") if len(ranks) > 1 else ("does", "it was stopped, has")
        return (
            f"{exchange.call}: {self.name(ranks)} {do} not answer, while other ranks wait in that call: {it} ended, or "
            "cannot be reached. Start the run again from its last checkpoint"
        )

    def _late(self, exchange: Exchange, records: Mapping[int, Record]) -> str | None:
        if not exchange.number:
            return None
        late = [rank for rank in exchange.ranks if not records[rank].has_started(exchange)]
        if not late:
            return (
                f"{exchange.call}: a rank came to that call, or to its end, later than {exchange.seconds:.0f} s, the "
                "timeout of the process group; now every rank answers and is there. If a rank may be late, pass "
                "init_process_group() a longer timeout"
            )
        last = ", ".join(f"{records[rank].last_call} on rank {rank}" for rank in late)
        return (
            f"{exchange.call}: {self.name(late)} did not come to that call within {exchange.seconds:.0f} s, the "
            f"timeout of the process group, but answers; the last collective call was {last}. Every rank must make the "
            "same calls (not under `if rank == 0:`). If a rank may be late, pass init_process_group() a longer timeout"
        )

    def _ask(self, ranks: Sequence[int], is_enough: Callable[[], bool] = lambda: False) -> dict[int, Record]:
        """Returns the records of this rank and of those that answer within ``ANSWER_SECONDS``, by rank.

        Args:
            ranks: who is asked. Ranks for which one of them waits are asked as well.
            is_enough: whether the answers are not needed any more.
        """
        question = _next_question(self.client, 1)
        self.client.set(f"{PREFIX}/question/{question}", b"", ANSWER_SECONDS)
        deadline, records, pending = time.monotonic() + ANSWER_SECONDS, {self.rank: self._record}, {*ranks, self.rank}
        while (pending := pending - records.keys()) and time.monotonic() < deadline and not is_enough():
            for rank in sorted(pending):
                data = self.client.get(_record_key(rank), ANSWER_SECONDS)
                answered, record = Record.from_json(data) if data is not None else (0, Record())
                if answered >= question:
                    records[rank] = record
                    pending |= set(record.exchange.ranks if record.exchange else ())
            time.sleep(POLL_SECONDS)
        return records


def _listen(client: StoreClient, rank: int, record: Record, stopped: threading.Event) -> None:
    """Answers questions of other ranks until ``stopped`` is set."""
    answered = 0
    while not stopped.wait(LISTEN_SECONDS):
        with contextlib.suppress(Exception):  # the store may be gone, and nobody is there to raise to
            question = _next_question(client, answered + 1) - 1
            if question > answered:
                client.set(_record_key(rank), record.to_json(question), ANSWER_SECONDS)
                answered = question


def _next_question(client: StoreClient, number: int) -> int:
    """Returns the first number from ``number`` on that no question has."""
    while client.has(f"{PREFIX}/question/{number}", ANSWER_SECONDS):
        number += 1
    return number


def _record_key(rank: int) -> str:
    return f"{PREFIX}/record/{rank}"


def _verdict_key(exchange: Exchange) -> str:
    return f"{PREFIX}/verdict/{exchange.group}/{exchange.number}"


def _turn(exchange: Exchange, rank: int) -> float:
    """Returns the seconds that ``rank`` leaves to ranks before it to ask."""
    return TURN_SECONDS * min(list(exchange.ranks).index(rank), MAX_TURNS) if exchange.number else 0.0


def _circle(rank: int, records: Mapping[int, Record]) -> dict[int, Exchange]:
    """Returns the exchanges of all ranks that wait for ``rank`` while it waits for them; empty if there are none.

    That a rank waits for another was true when the other one answered, and stays true along a circle: each rank can go
    on only after the one that it waits for, and ``rank``, which asks, has not.
    """
    waits = {
        r: (record.exchange, [other for other in record.exchange.ranks if _lacks(records.get(other), record.exchange)])
        for r, record in records.items()
        if record.exchange is not None and record.exchange.number
    }

    def reached(start: int) -> set[int]:
        found, left = set[int](), [start]
        while left:
            _, blockers = waits.get(left.pop(), (None, []))
            left += set(blockers) - found
            found |= set(blockers)
        return found

    return {r: waits[r][0] for r in sorted(reached(rank) & waits.keys()) if rank in reached(r)}


def _lacks(record: Record | None, exchange: Exchange) -> bool:
    """Returns whether the rank of ``record`` is known not to have started ``exchange``."""
    return record is not None and not record.has_started(exchange)


def _completes(work: dist.Work, seconds: float) -> bool:
    """Waits at most ``seconds``; returns whether ``work`` has completed or failed."""
    if not work.is_completed() and seconds >= 1e-3:  # gloo counts whole milliseconds, and 0 means no limit
        with contextlib.suppress(RuntimeError):  # it took longer or failed; wait() raises the latter
            work.wait(timedelta(seconds=seconds))
    return work.is_completed()


def _different(calls: Mapping[int, str]) -> str:
    ranks_in: dict[str, list[int]] = {}
    for rank, call in sorted(calls.items()):
        ranks_in.setdefault(call, []).append(rank)
    found = ", ".join(f"{ranges(ranks)} called {call}" for call, ranks in ranks_in.items())
    return (
        f"{found}: every rank must make the same collective calls, in the same order and with the same arguments (not "
        "under `if rank == 0:`)"
    )


def ranges(ranks: Sequence[int]) -> str:
    """Returns ascending ``ranks`` in words, such as ``"ranks 0, 3-5"``."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and parts[-1][-1] == rank - 1:
            parts[-1][1:] = [rank]
        else:
            parts.append([rank])
    return ("ranks " if len(ranks) > 1 else "rank ") + ", ".join("-".join(map(str, part)) for part in parts)


def place_of_this_process() -> str:
    """Returns the host and the number of this process, in words."""
    return f"process {os.getpid()} on host {socket.gethostname()}"
