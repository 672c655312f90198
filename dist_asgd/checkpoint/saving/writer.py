"""Writes what one rank has to write of a checkpoint: a file of archives, checksummed on the way."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from dist_asgd.boxes import Box
from dist_asgd.checkpoint.format.dcp_metadata import item_head, item_tail, object_item
from dist_asgd.checkpoint.format.manifest import NO_FRAME, SHARED, Item, in_directory
from dist_asgd.checkpoint.format.tensor_bytes import Checksums, block_bytes, memory_of
from dist_asgd.checkpoint.progress import Progress
from dist_asgd.checkpoint.storage.storage import Storage

ASIDE = 2**18  # bytes from which a checksum is made in another thread, while this one writes


@dataclass(frozen=True, slots=True)
class BlockToWrite:
    """A block of a tensor that this rank writes."""

    key: str
    box: Box
    data: Tensor  # of the box's sizes, any strides, any device
    is_whole: bool  # of the tensor


@dataclass(frozen=True, slots=True)
class Written:
    """What one rank has written, as it tells rank 0."""

    files: dict[str, int] = field(default_factory=dict)  # bytes
    items: list[Item] = field(default_factory=list)
    chunks: list[tuple[str, Box, int]] = field(default_factory=list)  # key, box, index in items
    objects: list[tuple[str, str, int, int]] = field(default_factory=list)  # key, file, offset, bytes

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Written:
        record = json.loads(data)
        chunks = [(key, Box(*map(tuple, box.values())), item) for key, box, item in record["chunks"]]
        items = [Item(**item) for item in record["items"]]
        return cls(record["files"], items, chunks, [tuple(entry) for entry in record["objects"]])


def write_parts(
    storage: Storage,
    directory: str,
    rank: int,
    parts: Sequence[BlockToWrite],
    objects: Mapping[str, Any],
    check: Callable[[], None],
) -> Written:
    """Writes the file of ``rank``, if it has anything to write.

    Args:
        directory: of the checkpoint, in ``storage``.
        objects: values that torch.distributed.checkpoint is to find, too.
        check: called for every few megabytes; raises to give up.
    """
    name, written = f"__{rank}_0.distcp", Written()
    if parts or objects:
        total = sum(part.data.numel() * part.data.element_size() for part in parts)
        progress = Progress(f"saving {in_directory(storage.url, directory)}", total, rank)
        with ThreadPoolExecutor(1, "dist_asgd-checksums") as aside:
            file = _File(name, written, check, aside, progress)
            written.files[name] = storage.write(in_directory(directory, name), file.chunks(parts, objects))
    return written


class _File:
    """A file under way: makes its bytes, and keeps the record of them."""

    def __init__(
        self, name: str, written: Written, check: Callable[[], None], aside: ThreadPoolExecutor, progress: Progress
    ) -> None:
        self._name, self._written, self._check, self._aside = name, written, check, aside
        self._progress = progress
        self._position = 0
        self._small: dict[tuple[torch.dtype, tuple[int, ...], bytes], int] = {}  # items that may be shared

    def chunks(self, parts: Sequence[BlockToWrite], objects: Mapping[str, Any]) -> Iterator[bytes | memoryview]:
        for part in parts:
            yield from self._part(part)
        if objects:
            yield self._objects(objects)

    def _part(self, part: BlockToWrite) -> Iterator[bytes | memoryview]:
        dtype, sizes, size = part.data.dtype, part.box.sizes, part.box.numel * part.data.dtype.itemsize
        content = None
        if part.is_whole and size <= SHARED:
            content = dtype, sizes, b"".join(memory_of(part.data))
            if content in self._small:
                self._written.chunks.append((part.key, part.box, self._small[content]))
                return
            self._small[content] = len(self._written.items)
        head, sums = item_head(dtype, sizes), Checksums(block_bytes(size))
        yield head
        for piece in memory_of(part.data):
            self._check()
            if len(piece) < ASIDE:
                sums.add(piece)
                yield piece
            else:
                added = self._aside.submit(sums.add, piece)
                yield piece
                added.result()
            self._progress.add(len(piece))
        tail = item_tail(dtype, sizes, sums.last)
        frame = f"{zlib.crc32(head):08x}{zlib.crc32(tail):08x}"
        item = Item(self._name, self._position, len(head), size, len(tail), sums.block, sums.text(), frame)
        self._written.chunks.append((part.key, part.box, len(self._written.items)))
        self._written.items.append(item)
        self._position = item.stop
        yield tail

    def _objects(self, objects: Mapping[str, Any]) -> bytes:
        """One item, which no tensor is in, has the checksums of all of them."""
        start, archives = self._position, [object_item(value) for value in objects.values()]
        for key, data in zip(objects, archives, strict=True):
            self._written.objects.append((key, self._name, self._position, len(data)))
            self._position += len(data)
        everything = b"".join(archives)
        sums = Checksums(block_bytes(len(everything)))
        sums.add(memoryview(everything))
        item = Item(self._name, start, 0, len(everything), 0, sums.block, sums.text(), NO_FRAME)
        self._written.items.append(item)
        return everything
