"""XXX docstring."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dist_asgd.checkpoint.storage.connection import Connection
from dist_asgd.checkpoint.storage.store import BytesLike, is_temporary, temporary_path, time_of
from dist_asgd.checkpoint.storage.uploads import BUFFER, Uploads


class MemoryUploads(Uploads):
    """fsspec's file system of this process, for tests and notebooks."""

    _lock = threading.Lock()  # all of them share one file system

    def create(self, path: str, data: bytes) -> None:
        with self._once("create", path), self._lock:
            fs = self._connection.fs()
            if fs.exists(self._connection.at(path)):
                raise FileExistsError
            fs.pipe_file(self._connection.at(path), data)

    def write(self, path: str, chunks: Iterable[BytesLike]) -> int:
        data = b"".join(bytes(chunk) for chunk in chunks)
        with self._once("write", path), self._lock:
            self._connection.fs().pipe_file(self._connection.at(path), data)
        return len(data)

    def remove(self, paths: list[str]) -> None:
        for path in paths:
            with self._once("remove", path), self._lock, contextlib.suppress(FileNotFoundError):
                self._connection.fs().rm_file(self._connection.at(path))

    def remove_folders(self, paths: list[str]) -> None:
        for path in paths:
            with self._once("remove", path), self._lock, contextlib.suppress(FileNotFoundError):
                self._connection.fs().rmdir(self._connection.at(path))

    def abort(self, prefix: str, older_than: float) -> int:
        return 0


class RenamedUploads(Uploads):
    """File systems with folders and a rename (sftp, smb, hdfs): files get their name when they are whole.

    fsspec has no fsync: how durable a file is, once its last byte was acknowledged, is up to the server.

    Args:
        rename_new: (file system, old, new): renames unless ``new`` exists; then FileExistsError.
        pipelined: files do not wait for the answer to each write.
    """

    def __init__(
        self, connection: Connection, rename_new: Callable[[Any, str, str], None], pipelined: bool = False
    ) -> None:
        super().__init__(connection)
        self._rename_new = rename_new
        self._pipelined = pipelined

    def create(self, path: str, data: bytes) -> None:
        numbers = itertools.count(1)

        def request() -> None:
            number = next(numbers)
            with self._temporary(path) as temporary:
                self._fill(temporary, data)
                fs, target = self._connection.fs(), self._connection.at(path)
                try:
                    self._rename_new(fs, temporary, target)
                except FileExistsError:  # perhaps our own, and the answer was lost
                    if number == 1 or fs.cat_file(target) != data:
                        raise

        self._again("create", path, request)

    def write(self, path: str, chunks: Iterable[BytesLike]) -> int:
        """A connection that is lost ends it: the chunks cannot be had again."""
        count = 0
        with self._temporary(path) as temporary:
            file = self._again("write", path, lambda: self._opened(temporary))
            try:
                for chunk in chunks:  # what this raises is the caller's own
                    with self._once("write", path):
                        count += write_to(file, chunk)
            except BaseException:
                with contextlib.suppress(Exception):
                    file.close()
                raise
            with self._once("write", path):
                file.close()
                self._check_size(temporary, count)
                self._connection.fs().mv(temporary, self._connection.at(path))
        return count

    def remove(self, paths: list[str]) -> None:
        for path in paths:
            self._again("remove", path, functools.partial(self._remove, path))

    def _remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._connection.fs().rm_file(self._connection.at(path))

    def remove_folders(self, paths: list[str]) -> None:
        for path in paths:
            self._again("remove", path, functools.partial(self._remove_folder, path))

    def _remove_folder(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._connection.fs().rmdir(self._connection.at(path))

    def abort(self, prefix: str, older_than: float) -> int:
        """Temporary files whose writer died."""
        whole = self._connection.at(prefix)
        found = self._again("list", prefix, lambda: self._connection.fs().find(whole, detail=True))
        latest = time.time() - older_than
        old = [name for name, info in found.items() if is_temporary(name) and (time_of(info) or latest + 1) <= latest]
        self.remove([prefix + name[len(whole) :] for name in old])
        return len(old)

    @contextlib.contextmanager
    def _temporary(self, path: str) -> Iterator[str]:
        """A free name beside ``path``, in a folder that exists; what has it in the end is removed."""
        temporary = self._connection.at(temporary_path(path))
        self._again("write", path, lambda: self._make_folder(temporary.rpartition("/")[0]))
        try:
            yield temporary
        finally:
            with contextlib.suppress(Exception):  # renamed, or the connection is gone: abort() finds it later
                self._connection.fs().rm_file(temporary)

    def _make_folder(self, folder: str) -> None:
        fs = self._connection.fs()
        try:
            fs.makedirs(folder, exist_ok=True)
        except OSError:
            if not fs.isdir(folder):  # else another rank made it just then
                raise

    def _opened(self, temporary: str) -> Any:
        file = self._connection.fs().open(temporary, "wb")
        if self._pipelined:
            file.set_pipelined(True)
        return file

    def _fill(self, temporary: str, data: bytes) -> None:
        with self._opened(temporary) as file:
            write_to(file, data)
        self._check_size(temporary, len(data))

    def _check_size(self, temporary: str, expected: int) -> None:
        """Errors of pipelined writes show nowhere else."""
        found = self._connection.fs().info(temporary)["size"]
        if found != expected:
            raise OSError(f"{found} of {expected} bytes arrived: is there space left?")


def write_to(file: Any, chunk: BytesLike) -> int:
    """In pieces, since drivers copy what they are given. Returns the bytes."""
    view = memoryview(chunk).cast("B")
    for start in range(0, len(view), BUFFER):
        file.write(bytes(view[start : start + BUFFER]))
    return len(view)


def rename_new_by_sftp(fs: Any, old: str, new: str) -> None:
    """SFTP's own rename spares what is there (OpenSSH makes a hard link); that of fsspec does not."""
    try:
        fs.ftp.rename(old, new)
    except OSError as error:
        if isinstance(error, FileNotFoundError | PermissionError) or not fs.exists(new):
            raise
        raise FileExistsError from error


def rename_new(fs: Any, old: str, new: str) -> None:
    """fsspec has no rename that spares what is there, so of several at the very same time the last one wins."""
    if fs.exists(new):
        raise FileExistsError
    fs.mv(old, new)
