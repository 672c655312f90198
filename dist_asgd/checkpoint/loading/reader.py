"""Reads just what a rank needs of a checkpoint, and writes to live tensors only when all of it has been verified."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_asgd.boxes import Box, cut_to_extents, extent, intersection, strides, whole, within
from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.format.entries import Block, TensorEntry
from dist_asgd.checkpoint.format.manifest import Chunk, Item, Manifest, in_directory
from dist_asgd.checkpoint.format.tensor_bytes import memory, narrowed
from dist_asgd.checkpoint.loading.spool import Verified
from dist_asgd.checkpoint.progress import Progress
from dist_asgd.checkpoint.storage.storage import Storage

EXTENT = 8 * 2**20  # bytes of a chunk that are read at once
REQUEST = 8 * 2**20  # bytes at most that extents are joined to
GAP = 2**14  # bytes that are rather read than left out by another request


@dataclass(frozen=True, slots=True)
class ChunkPart:
    """What a rank needs of a chunk for one of its blocks."""

    key: str
    item: int  # index of Manifest.items
    sizes: tuple[int, ...]  # of the chunk
    box: Box  # the part, in the chunk
    data: Tensor  # where it goes, of the box's sizes


@dataclass(frozen=True, slots=True)
class ChunkRead:
    """A part of a chunk that is read for one destination."""

    key: str
    item: Item
    sizes: tuple[int, ...]  # of the chunk
    box: Box  # the part, in the chunk
    data: Tensor  # where it goes, of the box's sizes
    blocks: range  # of the item, that hold it

    @property
    def start(self) -> int:
        """In the file."""
        return self.item.reach(self.blocks)[0]

    @property
    def stop(self) -> int:
        """In the file."""
        return self.item.reach(self.blocks)[1]


@dataclass(frozen=True, slots=True)
class RangeRequest:
    """A range of a file with everything that is needed of it."""

    file: str
    start: int
    stop: int
    needs: tuple[ChunkRead, ...]


def plan_reads(manifest: Manifest, destinations: Iterable[tuple[str, TensorEntry]]) -> list[RangeRequest]:
    """The requests that fill the blocks of ``destinations``: keys of the manifest, with tensors of their shapes."""
    return plan_parts(manifest, parts_of(manifest, destinations))


def parts_of(manifest: Manifest, destinations: Iterable[tuple[str, TensorEntry]]) -> list[ChunkPart]:
    """What fills the blocks of ``destinations``, chunk by chunk."""
    return [
        part
        for key, entry in destinations
        for block in entry.blocks
        for chunk in manifest.tensors[key].chunks
        if (part := _part(key, chunk, block)) is not None
    ]


def _part(key: str, chunk: Chunk, block: Block) -> ChunkPart | None:
    common = intersection(chunk.box, block.box)
    if common is None:
        return None
    data = narrowed(block.data, within(common, block.box))
    return ChunkPart(key, chunk.item, chunk.box.sizes, within(common, chunk.box), data)


def plan_parts(manifest: Manifest, parts: Iterable[ChunkPart]) -> list[RangeRequest]:
    """The requests that fill the ``parts``."""
    needs = [need for part in parts for need in _needs(part, manifest.items[part.item])]
    needs.sort(key=lambda need: (need.item.file, need.start, need.stop))
    requests: list[RangeRequest] = []
    joined: list[ChunkRead] = []
    stop = 0
    for need in needs:
        if joined and (
            need.item.file != joined[0].item.file
            or need.start > stop + GAP
            or (max(stop, need.stop) - joined[0].start > REQUEST and need.stop > stop)
        ):
            requests.append(_join(joined, stop))
            joined, stop = [], 0
        joined.append(need)
        stop = max(stop, need.stop)
    return [*requests, _join(joined, stop)] if joined else requests


def plan_rest(manifest: Manifest) -> list[RangeRequest]:
    """The requests that read what no tensor is in, to be verified only."""
    used = {chunk.item for tensor in manifest.tensors.values() for chunk in tensor.chunks}
    requests = []
    for item in (item for index, item in enumerate(manifest.items) if index not in used):
        step, count = max(1, REQUEST // item.block), -(-item.size // item.block)
        for first in range(0, count, step):
            blocks = range(first, min(first + step, count))
            need = ChunkRead("values", item, (item.size,), whole((item.size,)), torch.empty(0, device="cpu"), blocks)
            requests.append(RangeRequest(item.file, need.start, need.stop, (need,)))
    return requests


def _join(needs: Sequence[ChunkRead], stop: int) -> RangeRequest:
    return RangeRequest(needs[0].item.file, needs[0].start, stop, tuple(needs))


def _needs(part: ChunkPart, item: Item) -> Iterator[ChunkRead]:
    itemsize = part.data.element_size()
    for box in cut_to_extents(part.box, part.sizes, EXTENT // itemsize):
        data = narrowed(part.data, within(box, part.box))
        yield ChunkRead(part.key, item, part.sizes, box, data, blocks_of(box, part.sizes, itemsize, item))


def blocks_of(box: Box, sizes: Sequence[int], itemsize: int, item: Item) -> range:
    """The blocks of an ``item`` that hold a ``box`` of the chunk of these ``sizes``."""
    start, stop = extent(box, sizes)
    return range(start * itemsize // item.block, -(-stop * itemsize // item.block))


class VerifiedBlocks(Verified):
    """The requests, by the checksums of the manifest."""

    def __init__(self, storage: Storage, directory: str, requests: Sequence[RangeRequest]) -> None:
        super().__init__(storage, directory, sum(request.stop - request.start for request in requests))
        self._requests = requests
        self._places: dict[int, int] = {}  # where each request's bytes are kept

    def read(self, progress: Progress) -> None:
        for index, data in self._read():
            if not self._storage.is_local:
                self._places[index] = self._keep(data)
            progress.add(len(data))

    def apply(self, progress: Progress) -> None:
        for index, data in self._read() if self._storage.is_local else self._read_again():
            request = self._requests[index]
            for need in request.needs:
                _write(need, memoryview(data), request.start)
            progress.add(len(data))

    def _read(self) -> Iterator[tuple[int, bytes]]:
        ranges = [
            (in_directory(self._directory, request.file), request.start, request.stop) for request in self._requests
        ]
        for index, data in self._storage.read_ranges(ranges):
            verify_range(self._requests[index], data)
            yield index, data

    def _read_again(self) -> Iterator[tuple[int, bytes]]:
        for index, place in self._places.items():
            yield index, self._kept(place, self._requests[index].stop - self._requests[index].start)


def verify_range(request: RangeRequest, data: bytes | memoryview) -> None:
    """Raises ``CheckpointError`` unless the bytes of the request have the checksums in the manifest."""
    view, seen = memoryview(data), set()
    for need in request.needs:
        if (where := (need.item.offset, need.blocks)) in seen:  # tensors that share an item
            continue
        seen.add(where)
        part = view[need.start - request.start : need.stop - request.start]
        for start, stop in need.item.damages(need.blocks, part):
            raise CheckpointError(
                f"{need.item.file} is damaged: bytes {start} to {stop}, of {need.key!r}, do not have the checksum that "
                "manifest.json has of them"
            )


def read_into(storage: Storage, directory: str, requests: Sequence[RangeRequest]) -> None:
    """Reads, verifies and writes piece by piece: for tensors that nobody looks at if it raises ``CheckpointError``."""
    ranges = [(in_directory(directory, request.file), request.start, request.stop) for request in requests]
    for index, data in storage.read_ranges(ranges):
        verify_range(requests[index], data)
        for need in requests[index].needs:
            _write(need, memoryview(data), requests[index].start)


def _write(need: ChunkRead, data: memoryview, position: int) -> None:
    """``data`` is that from ``position`` of the file on."""
    itemsize = need.data.element_size()
    first, last = extent(need.box, need.sizes)
    at = need.item.start - position
    source = data[at + first * itemsize : at + last * itemsize]
    torch.autograd.graph.increment_version(need.data)
    if last - first == need.box.numel and need.data.device.type == "cpu" and need.data.is_contiguous():
        memory(need.data)[:] = source
        return
    buffer = torch.empty(last - first, dtype=need.data.dtype, device="cpu")
    memory(buffer)[:] = source
    need.data.copy_(buffer.as_strided(need.box.sizes, strides(need.sizes)))
