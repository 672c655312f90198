"""What a store must be able to do for Storage; names of files under way; times in what fsspec tells of a file."""

from __future__ import annotations

import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable
from datetime import datetime, timezone
from typing import Any, TypeAlias

BytesLike: TypeAlias = bytes | bytearray | memoryview

TIMES = ("LastModified", "last_modified", "updated", "mtime", "created")  # s3fs, adlfs, gcsfs, sftp, memory


class Store(ABC):
    """The requests that Storage makes. Paths are relative and checked; meanings and errors are told in storage.py."""

    @abstractmethod
    def create(self, path: str, data: bytes) -> None: ...

    @abstractmethod
    def write(self, path: str, chunks: Iterable[BytesLike]) -> int: ...

    @abstractmethod
    def read(self, path: str) -> bytes: ...

    @abstractmethod
    def read_range(self, path: str, start: int, stop: int) -> bytes: ...

    @abstractmethod
    def entries(self, path: str) -> dict[str, int | None]: ...

    @abstractmethod
    def sizes(self, path: str) -> dict[str, int]: ...

    @abstractmethod
    def remove(self, path: str) -> None: ...

    @abstractmethod
    def remove_tree(self, path: str) -> None: ...

    @abstractmethod
    def abort_uploads(self, prefix: str, older_than: float) -> int: ...

    @abstractmethod
    def modified(self, path: str) -> float | None: ...


def temporary_path(path: str) -> str:
    """Beside ``path``, for a file under way: whoever lists the folder leaves it out."""
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}.{name}.{secrets.token_hex(8)}.part"


def is_temporary(path: str) -> bool:
    return re.search(r"(^|/)\.[^/]+\.[0-9a-f]{16}\.part$", path) is not None


def time_of(info: dict[str, Any]) -> float | None:
    """Seconds since the epoch. Times without a zone are UTC."""
    moment = next((info[name] for name in TIMES if info.get(name) is not None), None)
    if isinstance(moment, str):
        moment = datetime.fromisoformat(moment.replace("Z", "+00:00"))
    if isinstance(moment, datetime):
        moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
        return moment.timestamp()
    return float(moment) if isinstance(moment, int | float) else None
