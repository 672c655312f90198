"""Reads and lists files of remote stores through fsspec, and declares how each kind of store changes them."""

from __future__ import annotations

import contextlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeAlias

from dist_asgd.checkpoint.storage.backend import Backend
from dist_asgd.checkpoint.storage.connection import Connection
from dist_asgd.checkpoint.storage.retry import http_statuses
from dist_asgd.checkpoint.storage.store import BytesLike, is_temporary, time_of
from dist_asgd.checkpoint.storage.waiting import threads

HTTP_NO_SUCH_RANGE = 416
REMOVALS = 16  # requests at once
# Name of the metadata by which a writer recognises its own object after a lost answer. It has letters only: Azure
# accepts no dashes, and proxies in front of S3 drop headers with underscores.
OWNER = "distasgdowner"

Info: TypeAlias = dict[str, Any]  # of a file or folder: its full name, type ("file", "directory"), size and time


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
        self.request_counts = connection.requests.counts
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

    def infos(self, path: str, deep: bool) -> list[Info]:
        """Returns infos, as fsspec has them, of the files and folders below ``path``; [] where nothing is.

        Lists folder by folder, because fsspec's ``find`` and ``walk`` take one that cannot be listed for an empty one.

        Args:
            deep: whether at any depth, or directly below ``path`` only.

        Raises:
            Exception: the driver has failed in any other way than by an answer that nothing is there.
        """
        whole = self._connection.full_path(path)
        self._connection.fs().invalidate_cache(whole)
        try:
            found = infos_in(self._connection.call("ls", whole, detail=True), whole)
        except (FileNotFoundError, NotADirectoryError):
            return []
        folders = [info["name"].rstrip("/") for info in found if info["type"] == "directory"] if deep else []
        below = (self.infos(self._connection.relative_path(folder), deep) for folder in folders)
        return [*found, *itertools.chain.from_iterable(below)]

    def read_range(self, path: str, start: int, stop: int | None) -> bytes:
        def request() -> bytes:
            try:
                whole = self._connection.full_path(path)
                return bytes(self._connection.call("cat_file", whole, start=start, end=stop))
            except Exception as error:
                if HTTP_NO_SUCH_RANGE in http_statuses(error):  # start lies behind the end of the file
                    return b""
                raise

        return self.retry("read", path, request)

    def entries(self, path: str) -> dict[str, int | None]:
        found = self._relative(path, self._listed(path, deep=False))
        return {name: None if info["type"] == "directory" else info["size"] for name, info in found.items()}

    def is_file(self) -> bool:
        return any(info["type"] == "file" for info in self._info(""))

    def sizes(self, path: str) -> dict[str, int]:
        found = self._relative(path, self._listed(path, deep=True))
        return {name: info["size"] for name, info in found.items() if info["type"] != "directory"}

    def remove(self, path: str) -> None:
        self.remove_files([path])

    def remove_tree(self, path: str) -> None:
        infos = self._listed(path, deep=True)
        if not infos:  # ``path`` may be a file
            self.remove_files([path])
        names = {self._connection.relative_path(info["name"].rstrip("/")): info for info in infos}
        relative = self._connection.relative_path
        self.remove_files([relative(info["name"]) for info in infos if info["type"] != "directory"])
        folders = {path, *(name for name, info in names.items() if info["type"] == "directory")}
        for name in names:  # object stores list files only
            while (name := name.rpartition("/")[0]).startswith(f"{path}/"):
                folders.add(name)
        self.remove_folders(sorted(folders, reverse=True))

    def modified(self, path: str) -> float | None:
        infos = self._listed(path, deep=True) or self._info(path)
        times = (time_of(info) for info in infos if info["type"] != "directory")
        return max((moment for moment in times if moment is not None), default=None)

    def _info(self, path: str) -> list[Info]:
        """Returns fsspec's info of what is at ``path``; [] where nothing is."""

        def request() -> list[Info]:
            with contextlib.suppress(FileNotFoundError):
                return [self._connection.call("info", self._connection.full_path(path))]
            return []

        return self.retry("look at", path, request)

    def _listed(self, path: str, deep: bool) -> list[Info]:
        """Returns what ``infos`` returns. Raises ``StorageError`` if anything could not be listed."""
        return self.retry("list", path, lambda: self.infos(path, deep))

    def _relative(self, path: str, infos: Iterable[Info]) -> dict[str, Info]:
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
                self._connection.call(method, self._connection.full_path(path))

        self.retry("remove", path, request)


def infos_in(answer: Iterable[Any], whole: str) -> list[Info]:
    """Returns the infos of files and folders in an answer of fsspec.

    Args:
        answer: what the file system's ``ls`` has returned.
        whole: the file system's name of the folder that was listed. Infos of names that are not below it are left out,
            because some drivers list a file as its own content, and others return nonsense for it.
    """
    infos = [info for info in answer if isinstance(info, dict) and "name" in info]
    return [info for info in infos if info["name"].rstrip("/").startswith(f"{whole}/")]


def remove_each(paths: Iterable[str], remove: Callable[[str], None]) -> None:
    """Calls ``remove`` for each path, many at once, for stores without a request that removes several files."""
    with threads(REMOVALS, "dist_asgd-remove") as pool:
        for _ in pool.map(remove, paths):
            pass
