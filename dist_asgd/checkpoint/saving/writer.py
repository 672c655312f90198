"""Writing of one rank's file of a checkpoint: a sequence of items, checksummed while they are written.

An item is laid out as [Note: items] in ``checkpoint/format/dcp_metadata.py`` describes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_asgd.boxes import Box
from dist_asgd.checkpoint.format.crc32 import crc32
from dist_asgd.checkpoint.format.dcp_metadata import item_head, item_tail, object_item
from dist_asgd.checkpoint.format.manifest import NO_FRAME, SHARED, Item, in_directory
from dist_asgd.checkpoint.format.tensor_bytes import Checksums, block_bytes, memory_of
from dist_asgd.checkpoint.progress import Progress
from dist_asgd.checkpoint.storage.storage import Storage

CHECKSUM_THREAD_BYTES = 2**18  # pieces of at least this size are checksummed in a second thread while they are written


@dataclass(frozen=True, slots=True)
class BlockToWrite:
    """A block of a tensor that this rank writes."""

    key: str
    box: Box  # in the whole tensor
    parts: Sequence[Tensor]  # of one dtype, at least one: together the box's elements in row-major order
    is_whole: bool  # whether the box is the whole tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensor."""
        return self.parts[0].dtype

    def pieces(self) -> Iterator[memoryview]:
        """Yields the bytes of the elements in row-major order."""
        for part in self.parts:
            yield from memory_of(part)


class WritableBlock(Protocol):
    """What is written of a block of a tensor: in memory, as ``BlockToWrite``, or made meanwhile, as a merge does."""

    @property
    def key(self) -> str: ...
    @property
    def box(self) -> Box: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def is_whole(self) -> bool: ...
    def pieces(self) -> Iterator[memoryview]: ...


@dataclass(frozen=True, slots=True)
class WriteResult:
    """What one rank has written, which it reports to rank 0 for the manifest."""

    files: dict[str, int] = field(default_factory=dict)  # name -> bytes
    items: list[Item] = field(default_factory=list)
    chunks: list[tuple[str, Box, int]] = field(default_factory=list)  # key, box, index into items
    objects: list[tuple[str, str, int, int]] = field(default_factory=list)  # key, file, offset and length in bytes

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes) -> WriteResult:
        record = json.loads(data)
        chunks = [(key, Box(*map(tuple, box.values())), item) for key, box, item in record["chunks"]]
        items = [Item(**item) for item in record["items"]]
        return cls(record["files"], items, chunks, [tuple(entry) for entry in record["objects"]])


def write_blocks(
    storage: Storage,
    directory: str,
    rank: int,
    blocks: Sequence[WritableBlock],
    objects: Mapping[str, Any],
    check: Callable[[], None],
) -> WriteResult:
    """Writes the file ``__<rank>_0.distcp``, if there is anything to write (step 2 of [Note: commit]). Not collective.

    The file appears under its name when it is whole and durable. If anything raises, it does not appear.

    Args:
        directory: of the checkpoint, relative to ``storage``; "" if the storage is that of one checkpoint.
        objects: values by key, written for torch.distributed.checkpoint only: the manifest has them, too.
        check: called every few megabytes; raises to abandon the file.

    Raises:
        OSError: the storage failed.
    """
    name, result = f"__{rank}_0.distcp", WriteResult()
    if blocks or objects:
        total = sum(block.box.numel * block.dtype.itemsize for block in blocks)
        progress = Progress(f"saving {in_directory(storage.url, directory)}", total, rank)
        with ThreadPoolExecutor(1, "dist_asgd-checksums") as checksum_thread:
            file = _FileWriter(name, result, check, checksum_thread, progress)
            result.files[name] = storage.write(in_directory(directory, name), file.pieces(blocks, objects))
    return result


class _FileWriter:
    """Generates the bytes of one file, and records its items in a ``WriteResult``."""

    def __init__(
        self,
        name: str,
        result: WriteResult,
        check: Callable[[], None],
        checksum_thread: ThreadPoolExecutor,
        progress: Progress,
    ) -> None:
        self._name, self._result, self._check, self._checksum_thread = name, result, check, checksum_thread
        self._progress = progress
        self._position = 0  # bytes of the file so far
        self._small: dict[tuple[torch.dtype, tuple[int, ...], bytes], int] = {}  # content -> index of its item

    def pieces(self, blocks: Sequence[WritableBlock], objects: Mapping[str, Any]) -> Iterator[bytes | memoryview]:
        """Yields the bytes of the file, in order."""
        for block in blocks:
            yield from self._block(block)
        if objects:
            yield self._objects(objects)

    def _block(self, block: WritableBlock) -> Iterator[bytes | memoryview]:
        """Yields the item of a block: nothing where a small tensor with equal content is in the file already."""
        dtype, sizes, size = block.dtype, block.box.sizes, block.box.numel * block.dtype.itemsize
        pieces: Iterable[memoryview] = block.pieces()
        if block.is_whole and size <= SHARED:
            pieces = [memoryview(b"".join(pieces))]
            content = dtype, sizes, bytes(pieces[0])
            if content in self._small:
                self._result.chunks.append((block.key, block.box, self._small[content]))
                return
            self._small[content] = len(self._result.items)
        head, sums = item_head(dtype, sizes), Checksums(block_bytes(size))
        yield head
        for piece in pieces:
            self._check()
            if len(piece) < CHECKSUM_THREAD_BYTES:
                sums.add(piece)
                yield piece
            else:
                added = self._checksum_thread.submit(sums.add, piece)
                yield piece
                added.result()
            self._progress.add(len(piece))
        tail = item_tail(dtype, sizes, sums.last)
        frame = f"{crc32(head):08x}{crc32(tail):08x}"
        item = Item(self._name, self._position, len(head), size, len(tail), sums.block, sums.text(), frame)
        self._result.chunks.append((block.key, block.box, len(self._result.items)))
        self._result.items.append(item)
        self._position = item.stop
        yield tail

    def _objects(self, objects: Mapping[str, Any]) -> bytes:
        """Returns the archives of all values. One item of the manifest, which no tensor uses, has their checksums."""
        start, archives = self._position, [object_item(value) for value in objects.values()]
        for key, data in zip(objects, archives, strict=True):
            self._result.objects.append((key, self._name, self._position, len(data)))
            self._position += len(data)
        everything = b"".join(archives)
        sums = Checksums(block_bytes(len(everything)))
        sums.add(memoryview(everything))
        item = Item(self._name, start, 0, len(everything), 0, sums.block, sums.text(), NO_FRAME)
        self._result.items.append(item)
        return everything
