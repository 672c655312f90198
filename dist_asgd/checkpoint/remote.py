"""Stores reached through fsspec: what is alike for all of them. How files get there and away differs: uploads.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from datetime import datetime, timezone
from typing import Any

from dist_asgd.checkpoint.connections import Connection
from dist_asgd.checkpoint.stores import Chunk, Store, is_temporary
from dist_asgd.checkpoint.uploads import Uploads

TIMES = ("LastModified", "last_modified", "updated", "mtime", "created")  # s3fs, adlfs, gcsfs, sftp, memory


class RemoteStore(Store):
    """The files below one URL."""

    def __init__(self, connection: Connection, uploads: Uploads) -> None:
        self._connection = connection
        self._uploads = uploads
        self._again = connection.requests.again

    def create(self, path: str, data: bytes) -> None:
        self._uploads.create(path, data)

    def write(self, path: str, chunks: Iterable[Chunk]) -> int:
        return self._uploads.write(path, chunks)

    def read(self, path: str) -> bytes:
        return self._again("read", path, lambda: bytes(self._connection.fs().cat_file(self._connection.at(path))))

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        def request() -> bytes:
            return bytes(self._connection.fs().cat_file(self._connection.at(path), start=start, end=stop))

        return self._again("read", path, request)

    def entries(self, path: str) -> dict[str, int | None]:
        found = self._relative(path, self._infos("ls", path))
        return {name: None if info["type"] == "directory" else info["size"] for name, info in found.items()}

    def sizes(self, path: str) -> dict[str, int]:
        return {name: info["size"] for name, info in self._relative(path, self._infos("find", path)).items()}

    def remove(self, path: str) -> None:
        self._uploads.remove([path])

    def remove_tree(self, path: str) -> None:
        infos = self._infos("find", path, withdirs=True)
        whole = self._connection.at(path)
        files = [info["name"] for info in infos if info["type"] != "directory"]
        self._uploads.remove([path + name[len(whole) :] for name in files])
        folders = {whole, *(info["name"].rstrip("/") for info in infos if info["type"] == "directory")}
        self._uploads.remove_folders(path + name[len(whole) :] for name in sorted(folders, reverse=True))

    def abort_uploads(self, prefix: str, older_than: float) -> int:
        return self._uploads.abort(prefix, older_than)

    def modified(self, path: str) -> float | None:
        times = (_time(info) for info in self._infos("find", path) if info["type"] != "directory")
        return max((moment for moment in times if moment is not None), default=None)

    def _infos(self, method: str, path: str, **arguments: Any) -> list[dict[str, Any]]:
        """What fs.ls or fs.find tell, never from their cache; nothing where nothing is."""
        whole = self._connection.at(path)

        def request() -> list[dict[str, Any]]:
            fs = self._connection.fs()
            fs.invalidate_cache(whole)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                found = getattr(fs, method)(whole, detail=True, **arguments)
                return list(found.values() if isinstance(found, dict) else found)
            return []

        return self._again("list", path, request)

    def _relative(self, path: str, infos: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """By name below ``path``; without the path itself, placeholders of folders and files under way."""
        above = f"{self._connection.at(path)}/"
        entries = {info["name"][len(above) :].rstrip("/"): info for info in infos if info["name"].startswith(above)}
        return {
            name: info
            for name, info in entries.items()
            if name and not is_temporary(name) and (info["type"] == "directory" or not info["name"].endswith("/"))
        }


def _time(info: dict[str, Any]) -> float | None:
    """Seconds since the epoch. Times without a zone are UTC."""
    moment = next((info[name] for name in TIMES if info.get(name) is not None), None)
    if isinstance(moment, str):
        moment = datetime.fromisoformat(moment.replace("Z", "+00:00"))
    if isinstance(moment, datetime):
        moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
        return moment.timestamp()
    return float(moment) if isinstance(moment, int | float) else None
