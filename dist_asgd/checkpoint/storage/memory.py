"""Keeps files in this process by fsspec's memory file system, for tests and notebooks."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from dist_asgd.checkpoint.storage.backend import Backend
from dist_asgd.checkpoint.storage.store import BytesLike
from dist_asgd.checkpoint.storage.uploads import Uploads


class MemoryUploads(Uploads):
    """Changes files in memory; one lock makes each change atomic."""

    backend = Backend(protocols=("memory",), is_thread_safe=True)
    _lock = threading.Lock()  # one for all instances, because they share one file system

    def create(self, path: str, data: bytes) -> None:
        with self._once("create", path), self._lock:
            fs = self._connection.fs()
            if fs.exists(self._connection.full_path(path)):
                raise FileExistsError
            fs.pipe_file(self._connection.full_path(path), data)

    def write(self, path: str, chunks: Iterable[BytesLike]) -> int:
        data = b"".join(bytes(chunk) for chunk in chunks)
        with self._once("write", path), self._lock:
            self._connection.fs().pipe_file(self._connection.full_path(path), data)
        return len(data)

    def remove(self, paths: list[str]) -> None:
        for path in paths:
            with self._lock:
                self._remove_by("rm_file", path)

    def remove_folders(self, paths: list[str]) -> None:
        for path in paths:
            with self._lock:
                self._remove_by("rmdir", path)

    def abort(self, prefix: str, older_than: float) -> int:
        """Returns 0: a killed process leaves nothing in memory."""
        return 0
