"""How ranks hear of one another while a checkpoint is written, in threads that must not run collectives.

Collectives of one group are matched by their order, so one in a background thread would meet those of the training.
What ranks have to tell goes through the key-value store of torch.distributed, by polling: nobody blocks in it, a
failure of one rank reaches the others while they still write, and a rank that has died is noticed by its heartbeat.
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

BEAT = 2.0  # seconds between heartbeats


SILENCE = 30.0  # seconds without a heartbeat after which a rank counts as dead


POLL = 0.02  # seconds


def store_of_its_own() -> dist.Store | None:
    """A connection to the key-value store that all ranks have; None where there is one rank.

    One connection serves one thread at a time, and the training may wait in its own for longer than ``SILENCE``: for a
    process group that other ranks make later, say.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    store = default_store()
    try:
        return store.clone()  # type: ignore[attr-defined,no-any-return]  # torch's stubs lack it
    except RuntimeError:  # a store that is written in Python need not have it
        return store


class Rendezvous:
    """The meeting of all ranks about one checkpoint. Used as a context manager around the rank's work.

    Args:
        store: ``store_of_its_own()``.
        name: the same on every rank, and never used before.
    """

    def __init__(self, store: dist.Store | None, name: str, rank: int, world_size: int) -> None:
        self._store = dist.PrefixStore(name, dist.HashStore() if store is None else store)
        self._rank, self._world_size = rank, world_size
        self._stopped = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="checkpoint heartbeat", daemon=True)
        self._checked = 0.0

    def __enter__(self) -> Rendezvous:
        if self._world_size > 1:
            self._store.add(f"beat/{self._rank}", 1)
            self._beats.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, AnotherFailed):
            with contextlib.suppress(Exception):  # what brought us here is what has to be heard of
                if self._store.add("failures", 1) == 1:
                    self._store.set("failed", json.dumps([self._rank, f"{type(error).__name__}: {error}"]))
        self._stopped.set()
        if self._beats.is_alive():
            self._beats.join()
            with contextlib.suppress(Exception):
                self._store.delete_key(f"beat/{self._rank}")

    def forget(self) -> None:
        """On rank 0, when all ranks have left: takes what they were told out of the store."""
        for key in ("verdict", "failed", "failures"):
            self._store.delete_key(key)

    def check(self) -> None:
        """Raises ``AnotherFailed`` if another rank has failed. Cheap enough to be called for every megabyte."""
        if self._world_size > 1 and time.monotonic() - self._checked > POLL:
            self._checked = time.monotonic()
            if self._store.check(["failed"]):
                rank, message = json.loads(self._store.get("failed"))
                raise AnotherFailed(f"rank {rank}: {message}")

    def bring(self, data: bytes) -> None:
        """This rank's part of what ``collect`` returns."""
        self._store.set(f"part/{self._rank}", data)  # type: ignore[arg-type]  # takes bytes, too

    def collect(self) -> list[bytes]:
        """On rank 0: what every rank has brought, by rank; waits for all of them."""
        parts = []
        for rank in range(self._world_size):
            parts.append(self._wait_for(f"part/{rank}", [rank]))
            self._store.delete_key(f"part/{rank}")
        return parts

    def conclude(self, verdict: str) -> None:
        """On rank 0: what every other rank waits for."""
        self._store.set("verdict", verdict)

    def verdict(self) -> str:
        """What rank 0 has concluded."""
        return self._wait_for("verdict", [0]).decode()

    def _wait_for(self, key: str, ranks: Sequence[int]) -> bytes:
        pulse = self._pulses(ranks)
        while not self._store.check([key]):
            self.check()
            next(pulse)
            time.sleep(POLL)
        return bytes(self._store.get(key))

    def _pulses(self, ranks: Sequence[int]) -> Iterator[None]:
        """Raises where one of the ranks, for ``SILENCE``, has shown no sign of life."""
        last = {rank: (0, time.monotonic()) for rank in ranks}
        looked = time.monotonic()
        while True:
            yield
            if (now := time.monotonic()) - looked < BEAT:
                continue
            looked = now
            for rank, (seen, since) in last.items():
                beat = self._store.add(f"beat/{rank}", 0)  # get() would block if that rank has just left
                if beat != seen:
                    last[rank] = beat, now
                elif now - since > SILENCE:
                    raise Gone(f"rank {rank} has given no sign of life for {SILENCE:.0f} s: it died or hangs")

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT):
            with contextlib.suppress(Exception):  # without a store, the others wait no longer than SILENCE
                self._store.add(f"beat/{self._rank}", 1)


class Gone(CheckpointError):
    """Another rank does not answer any more."""


class AnotherFailed(CheckpointError):
    """Another rank has failed; its message tells why."""
