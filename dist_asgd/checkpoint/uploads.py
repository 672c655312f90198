"""How files get into a store and away: whole or not at all."""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable

from dist_asgd.checkpoint.connections import Connection
from dist_asgd.checkpoint.stores import Chunk


class Uploads(ABC):
    """Changes to one store. Meanings and errors are told in storage.py."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._again = connection.requests.again
        self._once = connection.requests.once

    @abstractmethod
    def create(self, path: str, data: bytes) -> None: ...

    @abstractmethod
    def write(self, path: str, chunks: Iterable[Chunk]) -> int: ...

    @abstractmethod
    def remove(self, paths: list[str]) -> None: ...

    @abstractmethod
    def remove_folders(self, paths: Iterable[str]) -> None:
        """Which are empty; the deepest come first."""

    @abstractmethod
    def abort(self, prefix: str, older_than: float) -> int: ...


class MemoryUploads(Uploads):
    """fsspec's file system of this process, for tests and notebooks."""

    _lock = threading.Lock()  # all of them share one file system

    def create(self, path: str, data: bytes) -> None:
        with self._once("create", path), self._lock:
            fs = self._connection.fs()
            if fs.exists(self._connection.at(path)):
                raise FileExistsError
            fs.pipe_file(self._connection.at(path), bytes(data))

    def write(self, path: str, chunks: Iterable[Chunk]) -> int:
        data = b"".join(bytes(chunk) for chunk in chunks)
        with self._once("write", path), self._lock:
            self._connection.fs().pipe_file(self._connection.at(path), data)
        return len(data)

    def remove(self, paths: list[str]) -> None:
        with self._lock:
            for path in paths:
                with self._once("remove", path), contextlib.suppress(FileNotFoundError):
                    self._connection.fs().rm_file(self._connection.at(path))

    def remove_folders(self, paths: Iterable[str]) -> None:
        with self._lock:
            for path in paths:
                with self._once("remove", path), contextlib.suppress(FileNotFoundError):
                    self._connection.fs().rmdir(self._connection.at(path))

    def abort(self, prefix: str, older_than: float) -> int:
        return 0
