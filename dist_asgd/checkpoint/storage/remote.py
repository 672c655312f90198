"""Reads and lists files of remote stores through fsspec, and declares how each kind of store changes them."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

from dist_asgd.checkpoint.storage.backend import Backend
from dist_asgd.checkpoint.storage.connection import Connection
from dist_asgd.checkpoint.storage.retry import http_statuses
from dist_asgd.checkpoint.storage.store import BytesLike, is_temporary, time_of

HTTP_NO_SUCH_RANGE = 416
REMOVALS = 16  # requests at once
# Name of the metadata by which a writer recognises its own object after a lost answer. It has letters only: Azure
# accepts no dashes, and proxies in front of S3 drop headers with underscores.
OWNER = "distasgdowner"


class RemoteStore(ABC):
    """The files below one URL of a remote store: subclasses know how each kind of store is changed.

    All methods raise ``StorageError`` for a request that fails for good, and may be called by several threads at once.

    Attributes:
        backend: what is special about the store and its driver.
        retry: runs a request with retries (``Requests.retry``).
    """

    is_local = False
    backend: ClassVar[Backend]

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.retry = connection.requests.retry
        self._once = connection.requests.once

    @abstractmethod
    def create(self, path: str, data: bytes) -> None:
        """Creates a small file. Raises FileExistsError where there is one; of several callers exactly one succeeds."""

    @abstractmethod
    def write(self, path: str, chunks: Iterable[BytesLike]) -> int:
        """Writes or replaces a file of any size in bounded memory. Returns its size in bytes."""

    def remove_files(self, paths: list[str]) -> None:
        """Removes files, which need not exist."""
        for path in paths:
            self._remove_by("rm_file", path)

    def remove_folders(self, paths: list[str]) -> None:
        """Removes empty folders, given in the order deepest first, which need not exist."""
        for path in paths:
            self._remove_by("rmdir", path)

    def abort_uploads(self, prefix: str, older_than: float) -> int:
        """Clears away unfinished files of killed writers below the folder ``prefix``.

        Args:
            prefix: a folder; "" for the store's URL.
            older_than: seconds. Younger ones stay, because their writers may be alive.

        Returns:
            The number of unfinished files; 0 where a store clears up by itself, or nothing is left of a killed writer.
        """
        return 0

    def read_range(self, path: str, start: int, stop: int | None) -> bytes:
        def request() -> bytes:
            try:
                return bytes(self._connection.fs().cat_file(self._connection.full_path(path), start=start, end=stop))
            except Exception as error:
                if HTTP_NO_SUCH_RANGE in http_statuses(error):  # start lies behind the end of the file
                    return b""
                raise

        return self.retry("read", path, request)

    def entries(self, path: str) -> dict[str, int | None]:
        found = self._relative(path, self._listed("ls", path))
        return {name: None if info["type"] == "directory" else info["size"] for name, info in found.items()}

    def is_file(self) -> bool:
        return any(info["type"] == "file" for info in self._ask("", lambda fs, whole: [fs.info(whole)]))

    def sizes(self, path: str) -> dict[str, int]:
        return {name: info["size"] for name, info in self._relative(path, self._listed("find", path)).items()}

    def remove(self, path: str) -> None:
        self.remove_files([path])

    def remove_tree(self, path: str) -> None:
        infos = self._listed("find", path, withdirs=True)
        if not infos:  # ``path`` may be a file, which some drivers do not find below itself
            self.remove_files([path])
        relative = self._connection.relative_path
        self.remove_files([relative(info["name"]) for info in infos if info["type"] != "directory"])
        folders = {path, *(relative(info["name"].rstrip("/")) for info in infos if info["type"] == "directory")}
        self.remove_folders(sorted(folders, reverse=True))

    def modified(self, path: str) -> float | None:
        infos = self._listed("find", path) or self._ask(path, lambda fs, whole: [fs.info(whole)])
        times = (time_of(info) for info in infos if info["type"] != "directory")
        return max((moment for moment in times if moment is not None), default=None)

    def _listed(self, method: str, path: str, **arguments: Any) -> list[dict[str, Any]]:
        """Returns fsspec's infos of what ``ls`` or ``find`` lists below ``path``; [] where nothing is."""
        return self._ask(path, lambda fs, whole: infos_in(getattr(fs, method)(whole, detail=True, **arguments), whole))

    def _ask(self, path: str, ask: Callable[[Any, str], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """Returns what ``ask`` returns for the file system and its name of ``path``; [] where nothing is."""
        whole = self._connection.full_path(path)

        def request() -> list[dict[str, Any]]:
            fs = self._connection.fs()
            fs.invalidate_cache(whole)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                return ask(fs, whole)
            return []

        return self.retry("list", path, request)

    def _relative(self, path: str, infos: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Returns infos by their paths relative to ``path``, without placeholders of folders and temporary files."""
        return {
            self._connection.relative_path(info["name"].rstrip("/")).removeprefix(f"{path}/"): info
            for info in infos
            if not is_temporary(info["name"]) and (info["type"] == "directory" or not info["name"].endswith("/"))
        }

    def _remove_by(self, method: str, path: str) -> None:
        """Removes a file or folder, which need not exist, by the file system's ``method``."""

        def request() -> None:
            with contextlib.suppress(FileNotFoundError):
                getattr(self._connection.fs(), method)(self._connection.full_path(path))

        self.retry("remove", path, request)


def infos_in(answer: Any, whole: str) -> list[dict[str, Any]]:
    """Returns the infos of files and folders in an answer of fsspec.

    Args:
        answer: what the file system's ``ls`` or ``find`` has returned.
        whole: the file system's name of the folder that was listed. Infos of names that are not below it are left out,
            because some drivers list a file as its own content, and others return nonsense for it.
    """
    found = answer.values() if isinstance(answer, dict) else answer
    infos = [info for info in found if isinstance(info, dict) and "name" in info]
    return [info for info in infos if info["name"].rstrip("/").startswith(f"{whole}/")]


def remove_each(paths: Iterable[str], remove: Callable[[str], None]) -> None:
    """Calls ``remove`` for each path, many at once, for stores without a request that removes several files."""
    with ThreadPoolExecutor(REMOVALS, thread_name_prefix="dist_asgd-remove") as pool:
        for _ in pool.map(remove, paths):
            pass
