"""Reads and lists files of any remote store through fsspec; its ``Uploads`` (storage/uploads.py) change them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from dist_asgd.checkpoint.storage.connection import Connection
from dist_asgd.checkpoint.storage.retry import http_statuses
from dist_asgd.checkpoint.storage.store import BytesLike, Store, is_temporary, time_of
from dist_asgd.checkpoint.storage.uploads import Uploads

HTTP_NO_SUCH_RANGE = 416


class RemoteStore(Store):
    """The files below one URL of a remote store."""

    def __init__(self, connection: Connection, uploads: Uploads) -> None:
        self._connection = connection
        self._uploads = uploads
        self._retry = connection.requests.retry

    def create(self, path: str, data: bytes) -> None:
        self._uploads.create(path, data)

    def write(self, path: str, chunks: Iterable[BytesLike]) -> int:
        return self._uploads.write(path, chunks)

    def read(self, path: str) -> bytes:
        return self._read(path, 0, None)  # with a start of None, s3fs would ask for the size first

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        return self._read(path, start, stop)

    def _read(self, path: str, start: int, stop: int | None) -> bytes:
        def request() -> bytes:
            try:
                return bytes(self._connection.fs().cat_file(self._connection.full_path(path), start=start, end=stop))
            except Exception as error:
                if HTTP_NO_SUCH_RANGE in http_statuses(error):  # start lies behind the end of the file
                    return b""
                raise

        return self._retry("read", path, request)

    def entries(self, path: str) -> dict[str, int | None]:
        found = self._relative(path, self._ask("ls", path))
        return {name: None if info["type"] == "directory" else info["size"] for name, info in found.items()}

    def sizes(self, path: str) -> dict[str, int]:
        return {name: info["size"] for name, info in self._relative(path, self._ask("find", path)).items()}

    def remove(self, path: str) -> None:
        self._uploads.remove([path])

    def remove_tree(self, path: str) -> None:
        infos = self._ask("find", path, withdirs=True)
        if not infos:  # ``path`` may be a file, which some drivers do not find below itself
            self._uploads.remove([path])
        relative = self._connection.relative_path
        self._uploads.remove([relative(info["name"]) for info in infos if info["type"] != "directory"])
        folders = {path, *(relative(info["name"].rstrip("/")) for info in infos if info["type"] == "directory")}
        self._uploads.remove_folders(sorted(folders, reverse=True))

    def abort_uploads(self, prefix: str, older_than: float) -> int:
        return self._uploads.abort(prefix, older_than)

    def modified(self, path: str) -> float | None:
        infos = self._ask("find", path) or self._ask("info", path)
        times = (time_of(info) for info in infos if info["type"] != "directory")
        return max((moment for moment in times if moment is not None), default=None)

    def _ask(self, method: str, path: str, **arguments: Any) -> list[dict[str, Any]]:
        """Returns fsspec's infos of what ``ls`` or ``find`` lists below ``path``, or ``info`` of ``path`` itself.

        Returns [] where nothing is.
        """
        whole = self._connection.full_path(path)
        arguments |= {} if method == "info" else {"detail": True}

        def request() -> list[dict[str, Any]]:
            fs = self._connection.fs()
            fs.invalidate_cache(whole)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                return infos_in(getattr(fs, method)(whole, **arguments), whole, itself=method == "info")
            return []

        return self._retry("list", path, request)

    def _relative(self, path: str, infos: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Returns infos by their paths relative to ``path``, without placeholders of folders and temporary files."""
        return {
            self._connection.relative_path(info["name"].rstrip("/")).removeprefix(f"{path}/"): info
            for info in infos
            if not is_temporary(info["name"]) and (info["type"] == "directory" or not info["name"].endswith("/"))
        }


def infos_in(answer: Any, whole: str, itself: bool) -> list[dict[str, Any]]:
    """Returns the infos of files and folders in an answer of fsspec.

    Args:
        answer: what the file system's ``ls``, ``find`` or ``info`` has returned.
        whole: the file system's name of the folder that was listed. Infos of names that are not below it are left out,
            because some drivers list a file as its own content, and others return nonsense for it.
        itself: whether ``answer`` is that of ``info``, about ``whole`` itself.
    """
    if itself:
        return [answer]
    found = answer.values() if isinstance(answer, dict) else answer
    infos = [info for info in found if isinstance(info, dict) and "name" in info]
    return [info for info in infos if info["name"].rstrip("/").startswith(f"{whole}/")]
