"""Exchange between ranks while a checkpoint is written, from threads that must not run collectives.

Collectives of one group are matched by their order, so a collective in a background thread would be matched with those
of the training. Instead, ranks exchange short messages through the key-value store of torch.distributed (``TCPStore``,
say). They poll, so no call blocks in the store. A failure of one rank reaches the others while they are still writing,
and a rank that has died or was stopped is detected by its missing heartbeat.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from types import TracebackType

from dist_asgd.checkpoint.errors import CheckpointError, RankUnresponsive
from dist_asgd.comm.consensus import Agreement
from dist_asgd.comm.store import StoreClient, StoreUnresponsive

HEARTBEAT_SECONDS = 2.0  # at most, between two heartbeats of a rank
DEAD_SECONDS = 30.0  # at most, without a heartbeat, after which a rank counts as dead
POLL_SECONDS = 0.02  # between two looks into the store


class Rendezvous:
    """Collects the write results of all ranks on rank 0, and tells all ranks the outcome of one save.

    Used on every rank as a context manager around the rank's work. A heartbeat thread runs inside of the block. If the
    block raises, ``check``, ``collect`` and ``wait_for_outcome`` raise ``OtherRankFailed`` on the other ranks. A rank
    counts as dead after ``DEAD_SECONDS``, or the timeout of the process group if that is shorter, and the store too.

    Args:
        agreement: among the ranks of the save.
        name: prefix of the keys in the store; equal on every rank, and never used before.

    Raises:
        RankUnresponsive: where the block ends, if the process that hosts the store does not answer.
    """

    def __init__(self, agreement: Agreement, name: str) -> None:
        self._store, self._name = agreement.store, name
        self._rank, self._world_size, self._places = agreement.rank, agreement.world_size, agreement.places
        self._dead = min(DEAD_SECONDS, agreement.seconds)
        self._pause = min(HEARTBEAT_SECONDS, self._dead / 4)
        self._own = b""  # what this rank has submitted
        self._stopped = threading.Event()
        self._heart = threading.Thread(target=self._send_heartbeats, name="checkpoint heartbeat", daemon=True)
        self._checked = 0.0

    def __enter__(self) -> Rendezvous:
        if self._store is not None:
            self._store.add(self._key(f"heartbeat/{self._rank}"), 1, self._dead)
            self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        if self._store is None:
            return
        if error is not None and not isinstance(error, OtherRankFailed):
            with contextlib.suppress(StoreUnresponsive):  # an error of the store must not replace the original error
                if self._store.add(self._key("failures"), 1, self._dead) == 1:
                    told = [self._rank, f"{type(error).__name__}: {error}", isinstance(error, RankUnresponsive)]
                    self._store.set(self._key("failed"), json.dumps(told), self._dead)
        if self._heart.is_alive():
            self._heart.join()
            with contextlib.suppress(StoreUnresponsive):
                self._store.delete(self._key(f"heartbeat/{self._rank}"), self._dead)
        if isinstance(error, StoreUnresponsive):
            host = f". Rank 0 hosts the store ({self._places[0]}), if torchrun does not"
            raise RankUnresponsive(f"{error}{host}") from error

    def delete_keys(self) -> None:
        """Deletes the outcome from the store. Called on rank 0 when all ranks have left the block."""
        if self._store is not None:
            for key in ("outcome", "failed", "failures"):
                self._store.delete(self._key(key), self._dead)

    def check(self) -> None:
        """Raises ``OtherRankFailed`` if another rank has failed, ``RankUnresponsive`` if one is missing.

        Cheap enough to be called for every megabyte.
        """
        if self._store is not None and time.monotonic() - self._checked > POLL_SECONDS:
            self._checked = time.monotonic()
            if (failed := self._store.get(self._key("failed"), self._dead)) is not None:
                rank, message, is_missing = json.loads(failed)
                raise (RankUnresponsive if is_missing else OtherRankFailed)(f"rank {rank}: {message}")

    def submit(self, data: bytes) -> None:
        """Sends ``data`` to rank 0, where ``collect`` returns it. Does not wait for rank 0."""
        self._own = data
        if self._rank:
            self._set(f"result/{self._rank}", data)

    def collect(self) -> list[bytes]:
        """Returns what every rank has submitted, by rank. Called on rank 0; waits for all ranks.

        Raises:
            OtherRankFailed: a rank has failed.
            RankUnresponsive: a rank has submitted nothing and sent no heartbeat for ``DEAD_SECONDS``.
        """
        return [self._own, *(self._wait_for(f"result/{rank}", rank) for rank in range(1, self._world_size))]

    def announce(self, outcome: str) -> None:
        """Tells all other ranks the outcome. Called on rank 0."""
        self._set("outcome", outcome.encode())

    def wait_for_outcome(self) -> str:
        """Returns what rank 0 has announced; waits for it. Raises like ``collect``, for rank 0."""
        return self._wait_for("outcome", 0).decode()

    def _key(self, key: str) -> str:
        return f"{self._name}/{key}"

    def _set(self, key: str, data: bytes) -> None:
        if self._store is not None:
            self._store.set(self._key(key), data, self._dead)

    def _wait_for(self, key: str, rank: int) -> bytes:
        """Returns the value of ``key``, which ``rank`` sets; deletes it on rank 0, the only one to read it then."""
        store = self._store
        if store is None:
            raise ValueError("a rank by itself waits for nobody")
        watch = self._watch(store, rank)
        while (found := store.get(self._key(key), self._dead)) is None:
            self.check()
            next(watch)
            time.sleep(POLL_SECONDS)
        if self._rank == 0:
            store.delete(self._key(key), self._dead)
        return found

    def _watch(self, store: StoreClient, rank: int) -> Iterator[None]:
        """Looks for new heartbeats of ``rank`` at each ``next``. Raises ``RankUnresponsive``."""
        seen, since = 0, time.monotonic()
        looked = since
        while True:
            yield
            if (now := time.monotonic()) - looked < self._pause:
                continue
            looked = now
            count = store.add(self._key(f"heartbeat/{rank}"), 0, self._dead)
            if count != seen:
                seen, since = count, now
            elif now - since > self._dead:
                raise RankUnresponsive(
                    f"rank {rank} ({self._places[rank]}) has given no sign of life for {self._dead:.0f} s: it was "
                    "stopped, has ended, or cannot be reached. Nothing was committed"
                )

    def _send_heartbeats(self) -> None:
        while self._store is not None and not self._stopped.wait(self._pause):
            with contextlib.suppress(StoreUnresponsive):  # the others give up after DEAD_SECONDS
                self._store.add(self._key(f"heartbeat/{self._rank}"), 1, self._dead)


class OtherRankFailed(CheckpointError):
    """Another rank has failed; the message has its error."""
