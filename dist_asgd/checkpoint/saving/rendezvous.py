"""Exchange between ranks while a checkpoint is written, from threads that must not run collectives.

Collectives of one group are matched by their order, so a collective in a background thread would be matched with those
of the training. Instead, ranks exchange short messages through the key-value store of torch.distributed (``TCPStore``,
say). They poll, so no call blocks in the store. A failure of one rank reaches the others while they are still writing,
and a rank that has died is detected by its missing heartbeat.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from types import TracebackType

import torch.distributed as dist

from dist_asgd._torch_private import default_store
from dist_asgd.checkpoint.errors import CheckpointError

HEARTBEAT_SECONDS = 2.0  # between two heartbeats of a rank
DEAD_SECONDS = 30.0  # without a heartbeat, after which a rank counts as dead
POLL_SECONDS = 0.02  # between two looks into the store


def clone_default_store() -> dist.Store | None:
    """Returns a new connection to the key-value store that all ranks share, or None if there is one rank.

    A connection serves one thread at a time, and the training may block in the default one for longer than
    ``DEAD_SECONDS``, for example while it waits for other ranks to create a process group.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    store = default_store()
    try:
        return store.clone()  # type: ignore[attr-defined,no-any-return]  # torch's stubs lack it
    except RuntimeError:  # stores written in Python need not implement clone()
        return store


class Rendezvous:
    """Collects the write results of all ranks on rank 0, and tells all ranks the outcome of one save.

    Used on every rank as a context manager around the rank's work. A heartbeat thread runs inside of the block. If the
    block raises, ``check``, ``collect`` and ``wait_for_outcome`` raise ``OtherRankFailed`` on the other ranks.

    Args:
        store: from ``clone_default_store()``.
        name: prefix of the keys in the store; equal on every rank, and never used before.
    """

    def __init__(self, store: dist.Store | None, name: str, rank: int, world_size: int) -> None:
        self._store = dist.PrefixStore(name, dist.HashStore() if store is None else store)
        self._rank, self._world_size = rank, world_size
        self._stopped = threading.Event()
        self._heart = threading.Thread(target=self._send_heartbeats, name="checkpoint heartbeat", daemon=True)
        self._checked = 0.0

    def __enter__(self) -> Rendezvous:
        if self._world_size > 1:
            self._store.add(f"heartbeat/{self._rank}", 1)
            self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, OtherRankFailed):
            with contextlib.suppress(Exception):  # an error of the store must not replace the original error
                if self._store.add("failures", 1) == 1:
                    self._store.set("failed", json.dumps([self._rank, f"{type(error).__name__}: {error}"]))
        self._stopped.set()
        if self._heart.is_alive():
            self._heart.join()
            with contextlib.suppress(Exception):
                self._store.delete_key(f"heartbeat/{self._rank}")

    def delete_keys(self) -> None:
        """Deletes the outcome from the store. Called on rank 0 when all ranks have left the block."""
        for key in ("outcome", "failed", "failures"):
            self._store.delete_key(key)

    def check(self) -> None:
        """Raises ``OtherRankFailed`` if another rank has failed. Cheap enough to be called for every megabyte."""
        if self._world_size > 1 and time.monotonic() - self._checked > POLL_SECONDS:
            self._checked = time.monotonic()
            if self._store.check(["failed"]):
                rank, message = json.loads(self._store.get("failed"))
                raise OtherRankFailed(f"rank {rank}: {message}")

    def submit(self, data: bytes) -> None:
        """Sends ``data`` to rank 0, where ``collect`` returns it. Does not block."""
        self._store.set(f"result/{self._rank}", data)  # type: ignore[arg-type]  # takes bytes, too

    def collect(self) -> list[bytes]:
        """Returns what every rank has submitted, by rank. Called on rank 0; waits for all ranks.

        Raises:
            OtherRankFailed: a rank has failed.
            RankUnresponsive: a rank has submitted nothing and sent no heartbeat for ``DEAD_SECONDS``.
        """
        results = []
        for rank in range(self._world_size):
            results.append(self._wait_for(f"result/{rank}", [rank]))
            self._store.delete_key(f"result/{rank}")
        return results

    def announce(self, outcome: str) -> None:
        """Tells all other ranks the outcome. Called on rank 0."""
        self._store.set("outcome", outcome)

    def wait_for_outcome(self) -> str:
        """Returns what rank 0 has announced; waits for it. Raises like ``collect``, for rank 0."""
        return self._wait_for("outcome", [0]).decode()

    def _wait_for(self, key: str, ranks: Sequence[int]) -> bytes:
        watch = self._watch(ranks)
        while not self._store.check([key]):
            self.check()
            next(watch)
            time.sleep(POLL_SECONDS)
        return bytes(self._store.get(key))

    def _watch(self, ranks: Sequence[int]) -> Iterator[None]:
        """Looks for new heartbeats of the ranks at each ``next``. Raises ``RankUnresponsive``."""
        last = {rank: (0, time.monotonic()) for rank in ranks}
        looked = time.monotonic()
        while True:
            yield
            if (now := time.monotonic()) - looked < HEARTBEAT_SECONDS:
                continue
            looked = now
            for rank, (seen, since) in last.items():
                # get() would block if the rank has just left and deleted its key; add(0) reads without blocking.
                count = self._store.add(f"heartbeat/{rank}", 0)
                if count != seen:
                    last[rank] = count, now
                elif now - since > DEAD_SECONDS:
                    raise RankUnresponsive(
                        f"rank {rank} has given no sign of life for {DEAD_SECONDS:.0f} s: it died or hangs"
                    )

    def _send_heartbeats(self) -> None:
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(Exception):  # if the store is gone, the others give up after DEAD_SECONDS
                self._store.add(f"heartbeat/{self._rank}", 1)


class RankUnresponsive(CheckpointError):
    """Another rank sends no heartbeats any more."""


class OtherRankFailed(CheckpointError):
    """Another rank has failed; the message has its error."""
