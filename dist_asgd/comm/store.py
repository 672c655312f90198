"""Access to the key-value store of torch.distributed that ends in an error where the store does not answer."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, ClassVar, TypeVar

import torch.distributed as dist

EXIT_SECONDS = 2.0  # that the end of Python waits for an operation of a store that does not answer

T = TypeVar("T")

_Task = tuple[Callable[[dist.Store], Any], "Future[Any]"]


class StoreUnresponsive(RuntimeError):
    """The process that hosts the key-value store does not answer, or the connection to it is lost."""


class StoreClient:
    """Reads and writes the key-value store that all ranks share, each time within a limit.

    torch's own calls wait without limit for a process that hosts the store and is stopped. Here a daemon thread makes
    them, on a connection of its own, because the training may block in the default one. Any thread may use a client.
    Its keys are apart from those of others, and of earlier process groups that had the store.

    Args:
        store: the default store of torch.distributed.
        rank: global rank of this process.
    """

    _alive: ClassVar[weakref.WeakSet[StoreClient]] = weakref.WeakSet()

    def __init__(self, store: dist.Store, rank: int) -> None:
        self.address = _address_of(store)
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._late: Future[Any] | None = None  # an operation that has exceeded its limit
        self._thread = threading.Thread(
            target=_serve, args=(store, rank, self._tasks), name="dist_asgd store", daemon=True
        )
        self._thread.start()
        weakref.finalize(self, self._tasks.put, None)
        self._alive.add(self)

    @classmethod
    def end_all(cls) -> None:
        """Ends the threads of all clients before Python shuts down.

        A thread that comes back from C++ later finds no interpreter, and C++ then aborts the process.
        """
        clients = list(cls._alive)
        for client in clients:
            client._tasks.put(None)
        for client in clients:
            client._thread.join(EXIT_SECONDS)

    def set(self, key: str, value: bytes | str, seconds: float) -> None:
        """Stores ``value``. This and every other method raise ``StoreUnresponsive`` after ``seconds``."""
        self._do(lambda store: store.set(key, value), seconds)  # type: ignore[arg-type]  # takes bytes, too

    def get(self, key: str, seconds: float) -> bytes | None:
        """Returns the value of ``key``; None if there is none."""
        return self._do(lambda store: bytes(store.get(key)) if store.check([key]) else None, seconds)

    def set_new(self, key: str, value: bytes | str, seconds: float) -> None:
        """Stores ``value`` if ``key`` has none."""
        self._do(lambda store: store.compare_set(key, "", value), seconds)  # type: ignore[arg-type]

    def has(self, key: str, seconds: float) -> bool:
        """Returns whether ``key`` has a value."""
        return self._do(lambda store: store.check([key]), seconds)

    def add(self, key: str, amount: int, seconds: float) -> int:
        """Adds ``amount`` to the counter ``key``, which begins at 0, and returns the sum."""
        return self._do(lambda store: store.add(key, amount), seconds)

    def delete(self, key: str, seconds: float) -> None:
        """Deletes ``key``, which may be missing."""
        self._do(lambda store: store.delete_key(key), seconds)

    def _do(self, operation: Callable[[dist.Store], T], seconds: float) -> T:
        answer: Future[T] = Future()
        if self._late is None or self._late.done():  # else the thread still waits, so a second wait would tell nothing
            self._late = None
            self._tasks.put((operation, answer))
            try:
                return answer.result(seconds)
            except TimeoutError:
                self._late = answer
            except RuntimeError as error:
                raise StoreUnresponsive(f"{self._unresponsive()}: {error}") from error
        raise StoreUnresponsive(self._unresponsive())

    def _unresponsive(self) -> str:
        return (
            f"the process that hosts the key-value store of torch.distributed, at {self.address}, does not answer: it "
            "was stopped, has ended, or its host is out of reach"
        )


def _serve(store: dist.Store, rank: int, tasks: SimpleQueue[_Task | None]) -> None:
    own: dist.Store | None = None
    for operation, answer in iter(tasks.get, None):
        try:
            own = own or _connect(store, rank)
            answer.set_result(operation(own))
        except BaseException as error:
            answer.set_exception(error)


def _connect(store: dist.Store, rank: int) -> dist.Store:
    try:
        own: dist.Store = store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
    except RuntimeError:  # stores written in Python need not implement clone()
        own = store
    number = own.add(f"dist_asgd/clients of rank {rank}", 1)  # equal on every rank, since each makes one for a world
    return dist.PrefixStore(f"dist_asgd/{number}", own)


atexit.register(StoreClient.end_all)


def _address_of(store: dist.Store) -> str:
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return f"{store.host}:{store.port}" if isinstance(store, dist.TCPStore) else type(store).__name__
