"""How files get into a store and away: whole or not at all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from dist_asgd.checkpoint.storage.connection import Connection
from dist_asgd.checkpoint.storage.store import BytesLike

REMOVALS = 16  # at once


BUFFER = 2**20  # bytes handed to a file of a driver at once


class Uploads(ABC):
    """Changes to one store. Meanings and errors are told in storage/storage.py."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.requests = connection.requests
        self._again = connection.requests.again
        self._once = connection.requests.once

    @abstractmethod
    def create(self, path: str, data: bytes) -> None: ...

    @abstractmethod
    def write(self, path: str, chunks: Iterable[BytesLike]) -> int: ...

    @abstractmethod
    def remove(self, paths: list[str]) -> None:
        """Files, which need not be there."""

    @abstractmethod
    def remove_folders(self, paths: list[str]) -> None:
        """Empty ones, the deepest first; they need not be there."""

    @abstractmethod
    def abort(self, prefix: str, older_than: float) -> int: ...


def remove_each(paths: Iterable[str], remove: Callable[[str], None]) -> None:
    """Many at once, where a store has no request for several."""
    with ThreadPoolExecutor(REMOVALS, thread_name_prefix="dist_asgd-remove") as pool:
        for _ in pool.map(remove, paths):
            pass
