"""Ranges of files: many small ones by few requests, a large one as a file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TypeAlias

from dist_asgd.checkpoint.storage.storage import Storage

ByteRange: TypeAlias = tuple[str, int, int]  # file, start, stop


def joined(places: Sequence[ByteRange], most: int, gap: int = 0) -> list[tuple[ByteRange, list[int]]]:
    """Requests of at most ``most`` bytes, or of one place, each with the indices of the places that it has.

    Args:
        places: in their order.
        gap: bytes between two that are rather read than left out by another request.
    """
    requests: list[tuple[ByteRange, list[int]]] = []
    for index, (name, start, stop) in enumerate(places):
        if requests:
            (last, first, end), indices = requests[-1]
            if name == last and start - end <= gap and stop - first <= most:
                requests[-1] = (name, first, max(stop, end)), indices
                indices.append(index)
                continue
        requests.append(((name, start, stop), [index]))
    return requests


class FileRange(io.RawIOBase):
    """Bytes ``[start, stop)`` of a file, as a file. Each read is a request."""

    def __init__(self, storage: Storage, path: str, start: int, stop: int) -> None:
        self._storage, self._path = storage, path
        self._start, self._stop, self._at = start, stop, start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: self._start, io.SEEK_CUR: self._at, io.SEEK_END: self._stop}[whence]
        self._at = max(self._start, origin + offset)
        return self._at - self._start

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        stop = min(self._stop, self._at + len(buffer))
        if stop <= self._at:
            return 0
        ((_, data),) = self._storage.read_ranges([(self._path, self._at, stop)])
        self._at = stop
        buffer[: len(data)] = data
        return len(data)
