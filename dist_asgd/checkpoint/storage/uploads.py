"""Declares the changes that a remote store must be able to make: every file appears whole or not at all."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

from dist_asgd.checkpoint.storage.backend import Backend
from dist_asgd.checkpoint.storage.connection import Connection
from dist_asgd.checkpoint.storage.store import BytesLike

REMOVALS = 16  # requests at once
# Name of the metadata by which a writer recognises its own object after a lost answer. It has letters only: Azure
# accepts no dashes, and proxies in front of S3 drop headers with underscores.
OWNER = "distasgdowner"


class Uploads(ABC):
    """Changes to the files of one remote store. Paths are relative to the store's URL and checked.

    All methods raise ``StorageError`` for a request that fails for good, and may be called by several threads at once.

    Attributes:
        backend: what is special about the store and its driver.
        requests: runs requests with retries.
    """

    backend: ClassVar[Backend]

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.requests = connection.requests
        self._retry = connection.requests.retry
        self._once = connection.requests.once

    @abstractmethod
    def create(self, path: str, data: bytes) -> None:
        """Creates a small file. Raises FileExistsError where there is one; of several callers exactly one succeeds."""

    @abstractmethod
    def write(self, path: str, chunks: Iterable[BytesLike]) -> int:
        """Writes or replaces a file of any size in bounded memory. Returns its size in bytes."""

    @abstractmethod
    def remove(self, paths: list[str]) -> None:
        """Removes files, which need not exist."""

    @abstractmethod
    def remove_folders(self, paths: list[str]) -> None:
        """Removes empty folders, given in the order deepest first, which need not exist."""

    @abstractmethod
    def abort(self, prefix: str, older_than: float) -> int:
        """Clears away unfinished files of killed writers below the folder ``prefix``.

        Args:
            prefix: a folder; "" for the store's URL.
            older_than: seconds. Younger ones stay, because their writers may be alive.

        Returns:
            The number of unfinished files; 0 where a store clears up by itself.
        """

    def _remove_by(self, method: str, path: str) -> None:
        """Removes a file or folder, which need not exist, by the file system's ``method``."""

        def request() -> None:
            with contextlib.suppress(FileNotFoundError):
                getattr(self._connection.fs(), method)(self._connection.full_path(path))

        self._retry("remove", path, request)


def remove_each(paths: Iterable[str], remove: Callable[[str], None]) -> None:
    """Calls ``remove`` for each path, many at once, for stores without a request that removes several files."""
    with ThreadPoolExecutor(REMOVALS, thread_name_prefix="dist_asgd-remove") as pool:
        for _ in pool.map(remove, paths):
            pass
