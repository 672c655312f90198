"""Keeps files in this process by fsspec's memory file system, for tests and notebooks."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from dist_asgd.checkpoint.storage.backend import Backend
from dist_asgd.checkpoint.storage.remote import RemoteStore
from dist_asgd.checkpoint.storage.store import BytesLike


class MemoryStore(RemoteStore):
    """Changes files in memory; one lock makes each change atomic."""

    backend = Backend(protocols=("memory",), user_options=(), is_thread_safe=True)
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

    def _remove_by(self, method: str, path: str) -> None:
        with self._lock:
            super()._remove_by(method, path)
