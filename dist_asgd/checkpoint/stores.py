"""What a store must be able to do for Storage, and the names of files under way."""

from __future__ import annotations

import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TypeAlias

Chunk: TypeAlias = bytes | bytearray | memoryview


class Store(ABC):
    """The requests that Storage makes. Paths are relative and checked; meanings and errors are told in storage.py."""

    @abstractmethod
    def create(self, path: str, data: bytes) -> None: ...

    @abstractmethod
    def write(self, path: str, chunks: Iterable[Chunk]) -> int: ...

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
