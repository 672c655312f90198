"""Stores files on any fsspec file system that has folders and a rename: files get their name when they are whole."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterable, Iterator
from typing import Any

from dist_asgd.checkpoint.storage.backend import Backend
from dist_asgd.checkpoint.storage.remote import RemoteStore
from dist_asgd.checkpoint.storage.store import BytesLike, is_temporary, temporary_path, time_of
from dist_asgd.checkpoint.storage.waiting import tidying_up

BUFFER = 2**20  # bytes given to a driver's file at once


class RenamedStore(RemoteStore):
    """Changes files of any file system of fsspec that has folders and a rename (smb, hdfs and others).

    fsspec has no fsync, so it is up to the server how durable a file is whose last byte it has acknowledged. It has no
    way to go on with a file either, so an error while a large file is written ends that.
    """

    backend = Backend()

    def create(self, path: str, data: bytes) -> None:
        numbers = itertools.count(1)

        def request() -> None:
            number = next(numbers)
            with self._temporary(path) as temporary:
                self._fill(temporary, data)
                target = self._connection.full_path(path)
                try:
                    self._rename_new(temporary, target)
                except FileExistsError:  # perhaps this call's own: the answer to an earlier try may be lost
                    if number == 1 or self._connection.call("cat_file", target) != data:
                        raise

        self.retry("create", path, request)

    def write(self, path: str, chunks: Iterable[BytesLike]) -> int:
        """Writes a temporary file and renames it. A lost connection is an error: ``chunks`` cannot be read twice."""
        count = 0
        with self._temporary(path) as temporary:
            file = self.retry("write", path, lambda: self._open_new(temporary))
            try:
                for chunk in chunks:  # outside of _once: the caller's own errors pass unchanged
                    with self._once("write", path):
                        count += write_to(file, chunk)
            except BaseException:
                with contextlib.suppress(Exception):
                    file.close()
                raise
            with self._once("write", path):
                file.close()
                self._check_size(temporary, count)
                self._connection.fs().mv(temporary, self._connection.full_path(path))
        return count

    def abort_uploads(self, prefix: str, older_than: float) -> int:
        """Removes old temporary files, and returns their number."""
        latest = time.time() - older_than
        found = [info for info in self._listed(prefix, deep=True) if is_temporary(info["name"])]
        old = [info["name"] for info in found if (time_of(info) or latest + 1) <= latest]
        self.remove_files([self._connection.relative_path(name) for name in old])
        return len(old)

    @contextlib.contextmanager
    def _temporary(self, path: str) -> Iterator[str]:
        """Yields a new name beside ``path``, whose folder it makes; removes the file of that name after an error."""
        temporary = self._connection.full_path(temporary_path(path))
        self.retry("write", path, lambda: self._make_folder(temporary.rpartition("/")[0]))
        try:
            yield temporary
        except BaseException:
            with tidying_up():  # renamed, or the connection is lost: abort_uploads() finds it later
                self._discard(temporary)
            raise

    def _make_folder(self, folder: str) -> None:
        """Makes a folder and its parents, also where others make some of them at the same time.

        A driver's ``makedirs`` fails where another made a parent after it looked: each failure leaves one level less.
        """
        fs = self._connection.fs()
        for left in reversed(range(folder.count("/") + 1)):
            try:
                return fs.makedirs(folder, exist_ok=True)
            except OSError:
                if self._is_folder(folder):
                    return
                if not left:
                    raise

    def _is_folder(self, name: str) -> bool:
        """Returns whether a folder exists. Raises the driver's errors; fsspec's ``isdir`` takes them for a no."""
        with contextlib.suppress(FileNotFoundError):
            return bool(self._connection.call("info", name)["type"] == "directory")
        return False

    def _discard(self, name: str) -> None:
        """Removes a temporary file, if it exists."""
        self._connection.call("rm_file", name)

    def _open_new(self, name: str) -> Any:
        return self._connection.fs().open(name, "wb")

    def _rename_new(self, old: str, new: str) -> None:
        """Renames a file; raises FileExistsError where ``new`` exists.

        fsspec has no rename that spares an existing file, so the last of several concurrent renames wins.
        """
        with contextlib.suppress(FileNotFoundError):
            self._connection.call("info", new)  # fsspec's exists() takes any error for a no
            raise FileExistsError
        self._connection.fs().mv(old, new)

    def _fill(self, temporary: str, data: bytes) -> None:
        with self._open_new(temporary) as file:
            write_to(file, data)
        self._check_size(temporary, len(data))

    def _check_size(self, temporary: str, expected: int) -> None:
        """Raises OSError unless the file has the expected size; errors of pipelined writes show nowhere else."""
        found = self._connection.fs().info(temporary)["size"]
        if found != expected:
            raise OSError(f"{found} of {expected} bytes arrived: is there space left?")


def write_to(file: Any, chunk: BytesLike) -> int:
    """Writes to a driver's file in small pieces, because drivers copy what they are given. Returns the bytes."""
    view = memoryview(chunk).cast("B")
    for start in range(0, len(view), BUFFER):
        file.write(bytes(view[start : start + BUFFER]))
    return len(view)
