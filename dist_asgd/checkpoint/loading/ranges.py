"""Reads files of a checkpoint: records as a whole, small ranges by few requests, a large range as a file object."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from dist_asgd.checkpoint.errors import naming
from dist_asgd.checkpoint.format.dcp_metadata import StoredChunk, StoredObject
from dist_asgd.checkpoint.format.manifest import MANIFEST, check_size, in_directory
from dist_asgd.checkpoint.stock.metadata import check_metadata_size
from dist_asgd.checkpoint.storage.storage import Storage

READ_BYTES = 8 * 2**20  # bytes of one request, if several ranges are joined or a large one is cut
GAP = 2**14  # bytes between two ranges up to which reading them costs less than another request

ByteRange: TypeAlias = tuple[str, int, int]  # file, start, stop


def range_of(stored: StoredChunk | StoredObject) -> ByteRange:
    """Returns the bytes of an item of ``.metadata``."""
    return stored.path, stored.offset, stored.offset + stored.length


def read_record(storage: Storage, directory: str, name: str, sizes: Mapping[str, int]) -> bytes:
    """Returns the bytes of ``manifest.json`` or ``.metadata``, the files that are read as a whole.

    Args:
        directory: of the checkpoint, relative to ``storage``; "" if the storage is that of one checkpoint.
        sizes: of the files in the directory, as listed: a file that is too large is refused without reading it.

    Raises:
        FileNotFoundError: the file is not listed.
        CheckpointError: the file is larger than any that a save writes.
    """
    path = in_directory(directory, name)
    if name not in sizes:
        raise FileNotFoundError(errno.ENOENT, "no such file", f"{storage.url}/{path}")
    with naming(in_directory(storage.url, directory)):
        (check_size if name == MANIFEST else check_metadata_size)(sizes[name])
    return storage.read(path)


def join_ranges(ranges: Sequence[ByteRange], most: int, gap: int = 0) -> list[tuple[ByteRange, list[int]]]:
    """Joins neighbouring ranges into requests. A request has at most ``most`` bytes, or is a single range.

    Args:
        ranges: sorted. They may overlap.
        gap: bytes between two ranges of one file up to which they are joined.

    Returns:
        For each request its range, and the indices of the ``ranges`` that lie in it.
    """
    requests: list[tuple[ByteRange, list[int]]] = []
    for index, (name, start, stop) in enumerate(ranges):
        if requests:
            (last, first, end), indices = requests[-1]
            if name == last and start - end <= gap and stop <= max(end, first + most):
                requests[-1] = (name, first, max(stop, end)), indices
                indices.append(index)
                continue
        requests.append(((name, start, stop), [index]))
    return requests


def read_joined(
    storage: Storage, directory: str, ranges: Sequence[ByteRange], most: int, gap: int = 0
) -> Iterator[tuple[int, bytes]]:
    """Reads ``ranges`` of files in ``directory`` by the requests of ``join_ranges``, several at once.

    Yields (index into ``ranges``, its bytes), the requests in any order. Raises ``OSError`` if a file is missing or
    shorter than expected.
    """
    requests = join_ranges(ranges, most, gap)
    places = [(in_directory(directory, name), start, stop) for (name, start, stop), _ in requests]
    for number, data in storage.read_ranges(places):
        (_, first, _), indices = requests[number]
        for index in indices:
            _, start, stop = ranges[index]
            yield index, data[start - first : stop - first]


class FileRange(io.RawIOBase):
    """Bytes ``[start, stop)`` of a file in storage as a seekable, read-only file object. Each read is one request."""

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
