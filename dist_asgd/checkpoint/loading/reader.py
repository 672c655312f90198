"""Reading from a checkpoint of this library: the parts of chunks that a rank needs, in verifiable blocks.

A *chunk* is a box of a tensor that is stored in one item of a file. A *block* is a range of an item that has a checksum
of its own in ``manifest.json``, so a reader that needs a part of a chunk reads the blocks that contain the part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_asgd.boxes import Box, cut_to_extents, extent, intersection, strides, whole, within
from dist_asgd.checkpoint.errors import CheckpointError, DamagedCheckpoint
from dist_asgd.checkpoint.format.casts import copy_rounded
from dist_asgd.checkpoint.format.entries import Block, TensorEntry
from dist_asgd.checkpoint.format.manifest import Chunk, Item, Manifest, in_directory
from dist_asgd.checkpoint.format.tensor_bytes import memory, narrowed
from dist_asgd.checkpoint.loading.ranges import GAP, READ_BYTES, ByteRange, join_ranges
from dist_asgd.checkpoint.loading.spool import VerifiedRead
from dist_asgd.checkpoint.progress import Progress
from dist_asgd.checkpoint.storage.storage import Storage


@dataclass(frozen=True, slots=True)
class ChunkPart:
    """The part of a chunk that fills one block of a live tensor, or some of it."""

    key: str
    item: int  # index into Manifest.items
    sizes: tuple[int, ...]  # of the chunk
    box: Box  # the part, in the coordinates of the chunk
    dtype: torch.dtype  # of the stored elements
    data: Tensor  # view of the live tensor that the part is copied to; shape: the box's sizes; any dtype


@dataclass(frozen=True, slots=True)
class ChunkRead:
    """A ``ChunkPart``, or a piece of one, that is read at once, with the blocks to read."""

    key: str
    item: Item
    sizes: tuple[int, ...]  # of the chunk
    box: Box  # in the coordinates of the chunk
    dtype: torch.dtype  # of the stored elements
    data: Tensor  # view of the live tensor that the elements are copied to; shape: the box's sizes; any dtype
    blocks: range  # of the item: those that contain the box

    @property
    def place(self) -> ByteRange:
        """The bytes to read: the blocks, with the item's head or tail where they are its first or last."""
        return self.item.file, *self.item.reach(self.blocks)


@dataclass(frozen=True, slots=True)
class RangeRequest:
    """One request for a range of a file, with everything that is read from it."""

    file: str
    start: int
    stop: int
    reads: tuple[ChunkRead, ...]


def plan_reads(manifest: Manifest, destinations: Iterable[tuple[str, TensorEntry]]) -> list[RangeRequest]:
    """Returns the requests that fill the blocks of ``destinations``.

    Args:
        destinations: (key in the manifest, live tensor of the saved shape). Another dtype is rounded to.
    """
    return plan_parts(manifest, chunk_parts(manifest, destinations))


def chunk_parts(manifest: Manifest, destinations: Iterable[tuple[str, TensorEntry]]) -> list[ChunkPart]:
    """Returns the parts of chunks that fill the blocks of ``destinations``, which are as for ``plan_reads``."""
    return [
        part
        for key, entry in destinations
        for block in entry.blocks
        for chunk in manifest.tensors[key].chunks
        if (part := _part(key, manifest.tensors[key].saved.dtype, chunk, block)) is not None
    ]


def require_equal_ties(manifest: Manifest, parts: Iterable[ChunkPart]) -> None:
    """Raises ``CheckpointError`` where entries with different elements would be read into one place (tied weights).

    Entries that were saved in different chunks are not compared, nor are views that overlap in part: what is saved from
    such tensors is equal where they overlap.
    """
    seen: dict[tuple[Any, ...], ChunkPart] = {}
    for part in parts:
        place = part.data.data_ptr(), part.data.shape, part.data.stride(), part.data.dtype, part.data.device
        first = seen.setdefault((*place, part.box, part.sizes), part)
        one, other = manifest.items[first.item], manifest.items[part.item]
        if part.data.numel() and one.crc32[-8:] != other.crc32[-8:]:
            raise CheckpointError(
                f"{first.key!r} and {part.key!r} are one tensor here, and have different elements in the checkpoint: "
                "load it into a state in which they are not tied, or only one of them"
            )


def _part(key: str, dtype: torch.dtype, chunk: Chunk, block: Block) -> ChunkPart | None:
    common = intersection(chunk.box, block.box)
    if common is None:
        return None
    data = narrowed(block.data, within(common, block.box))
    return ChunkPart(key, chunk.item, chunk.box.sizes, within(common, chunk.box), dtype, data)


def plan_parts(manifest: Manifest, parts: Iterable[ChunkPart]) -> list[RangeRequest]:
    """Returns the requests that fill the ``parts``: neighbouring ranges joined, up to ``READ_BYTES``."""
    reads = [read for part in parts for read in _split(part, manifest.items[part.item])]
    reads.sort(key=lambda read: read.place)
    requests = join_ranges([read.place for read in reads], READ_BYTES, GAP)
    return [RangeRequest(*place, tuple(reads[index] for index in indices)) for place, indices in requests]


def plan_value_reads(manifest: Manifest) -> list[RangeRequest]:
    """Returns requests for the items that no tensor uses: values for stock readers, which are verified only."""
    used = {chunk.item for tensor in manifest.tensors.values() for chunk in tensor.chunks}
    requests = []
    for item in (item for index, item in enumerate(manifest.items) if index not in used):
        for blocks in item.block_ranges(READ_BYTES):
            nothing = torch.empty(0, dtype=torch.uint8, device="cpu")
            read = ChunkRead("values", item, (item.size,), whole((item.size,)), torch.uint8, nothing, blocks)
            requests.append(RangeRequest(*read.place, (read,)))
    return requests


def _split(part: ChunkPart, item: Item) -> Iterator[ChunkRead]:
    """Cuts a part so that a piece, with what lies between its rows in the file, has at most ``READ_BYTES``."""
    itemsize = part.dtype.itemsize
    for box in cut_to_extents(part.box, part.sizes, READ_BYTES // itemsize):
        data = narrowed(part.data, within(box, part.box))
        yield ChunkRead(part.key, item, part.sizes, box, part.dtype, data, blocks_of(box, part.sizes, itemsize, item))


def blocks_of(box: Box, sizes: Sequence[int], itemsize: int, item: Item) -> range:
    """Returns the blocks of ``item`` that contain ``box``.

    Args:
        box: in the coordinates of the chunk that the item stores.
        sizes: of the chunk.
        itemsize: bytes of an element.
    """
    start, stop = extent(box, sizes)
    return range(start * itemsize // item.block, -(-stop * itemsize // item.block))


class VerifiedBlocks(VerifiedRead):
    """The reads of one rank from a checkpoint of this library, verified by the checksums in the manifest."""

    def __init__(self, storage: Storage, directory: str, requests: Sequence[RangeRequest]) -> None:
        super().__init__(storage, directory, sum(request.stop - request.start for request in requests))
        self._requests = requests
        self._positions: dict[int, int] = {}  # index of a request -> position of its bytes in the spool

    def read(self, progress: Progress) -> None:
        for index, data in self._read():
            if not self._storage.is_local:
                self._positions[index] = self._append(data)
            progress.add(len(data))

    def apply(self, progress: Progress) -> None:
        for index, data in self._read() if self._storage.is_local else self._spooled():
            _copy(self._requests[index], data)
            progress.add(len(data))

    def _read(self) -> Iterator[tuple[int, bytes]]:
        return read_verified(self._storage, self._directory, self._requests)

    def _spooled(self) -> Iterator[tuple[int, bytes]]:
        for index, position in self._positions.items():
            yield index, self._read_back(position, self._requests[index].stop - self._requests[index].start)


def read_into(storage: Storage, directory: str, requests: Sequence[RangeRequest]) -> None:
    """Reads, verifies and copies request by request. Not collective.

    Raises:
        DamagedCheckpoint: bytes are damaged. The tensors are filled in part then, so they must not be live state.
    """
    for index, data in read_verified(storage, directory, requests):
        _copy(requests[index], data)


def read_verified(storage: Storage, directory: str, requests: Sequence[RangeRequest]) -> Iterator[tuple[int, bytes]]:
    """Yields (index of a request, its bytes), in any order. Raises ``DamagedCheckpoint`` where bytes are damaged."""
    ranges = [(in_directory(directory, request.file), request.start, request.stop) for request in requests]
    for index, data in storage.read_ranges(ranges):
        verify_request(requests[index], data)
        yield index, data


def verify_request(request: RangeRequest, data: bytes | memoryview) -> None:
    """Raises ``DamagedCheckpoint`` unless ``data``, the bytes of the request, have the checksums in the manifest."""
    view, seen = memoryview(data), set()
    for read in request.reads:
        if read.place in seen:  # tensors may share an item
            continue
        seen.add(read.place)
        _, first, last = read.place
        for start, stop in read.item.damages(read.blocks, view[first - request.start : last - request.start]):
            raise DamagedCheckpoint(
                f"{read.item.file} is damaged: bytes {start} to {stop}, of {read.key!r}, do not have the checksum that "
                "manifest.json has of them"
            )


def _copy(request: RangeRequest, data: bytes) -> None:
    """Copies the bytes of a request to the tensors of its reads."""
    for read in request.reads:
        itemsize = read.dtype.itemsize
        first, last = extent(read.box, read.sizes)
        at = read.item.start - request.start
        source = memoryview(data)[at + first * itemsize : at + last * itemsize]
        torch.autograd.graph.increment_version(read.data)
        is_dense = last - first == read.box.numel and read.data.device.type == "cpu" and read.data.is_contiguous()
        if is_dense and read.data.dtype == read.dtype:
            memory(read.data)[:] = source
            continue
        buffer = torch.empty(last - first, dtype=read.dtype, device="cpu")
        memory(buffer)[:] = source
        copy_rounded(read.data, buffer.as_strided(read.box.sizes, strides(read.sizes)))
