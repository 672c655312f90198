"""Reading from a checkpoint of ``torch.distributed.checkpoint`` (DCP): whole items, verified by their CRC-32s.

An *item* is the zip archive that ``torch.save`` makes of one chunk of a tensor, see [Note: items] in
``checkpoint/format/dcp_metadata.py``. It has one CRC-32 of all its elements, so a rank that needs some of them reads
the whole item. From a remote store, only the elements that the rank needs are spooled until all ranks have verified
theirs.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, cast

import torch
from torch import Tensor

from dist_asgd.boxes import Box, boxes, intersection, strides, whole, within
from dist_asgd.checkpoint.errors import CheckpointError, naming
from dist_asgd.checkpoint.format.casts import copy_rounded
from dist_asgd.checkpoint.format.crc32 import crc32
from dist_asgd.checkpoint.format.dcp_metadata import StoredObject
from dist_asgd.checkpoint.format.entries import Block, SavedTensor, TensorEntry
from dist_asgd.checkpoint.format.manifest import in_directory
from dist_asgd.checkpoint.format.tensor_bytes import as_bits, memory, narrowed
from dist_asgd.checkpoint.loading.ranges import GAP, READ_BYTES, ByteRange, FileRange, range_of, read_joined
from dist_asgd.checkpoint.loading.spool import VerifiedRead
from dist_asgd.checkpoint.progress import Progress
from dist_asgd.checkpoint.stock.items import CRC_HINT, Layout, item_layout, item_tensor
from dist_asgd.checkpoint.stock.metadata import StockTensor
from dist_asgd.checkpoint.storage.storage import Storage

READS_AHEAD = 4  # pieces of a large item that are read at once


@dataclass(frozen=True, slots=True)
class StockItem:
    """An item with everything that a rank needs of it."""

    key: str
    place: ByteRange
    saved: SavedTensor  # shape and dtype of the chunk
    parts: list[Block] = field(default_factory=list)  # in the coordinates of the chunk; views of live tensors

    @property
    def is_large(self) -> bool:
        """Whether it is read in pieces of ``READ_BYTES``."""
        return self.place[2] - self.place[1] > READ_BYTES

    @property
    def damage(self) -> str:
        """The beginning of an error's message."""
        name, start, stop = self.place
        return f"{name} is damaged: bytes {start} to {stop}, of {self.key!r}"


def plan_items(tensors: Mapping[str, StockTensor], wanted: Iterable[tuple[str, TensorEntry]]) -> list[StockItem]:
    """Returns the items that fill the blocks of ``wanted``, sorted by file and offset.

    Args:
        tensors: of the checkpoint, by key.
        wanted: (key, live tensor of the saved shape).
    """
    items: dict[tuple[ByteRange, SavedTensor], StockItem] = {}
    for key, entry in wanted:
        for chunk in tensors[key].chunks:
            place = range_of(chunk)
            saved = SavedTensor(chunk.box.sizes, tensors[key].saved.dtype)
            for block in entry.blocks:
                common = intersection(chunk.box, block.box)
                if common is not None:
                    item = items.setdefault((place, saved), StockItem(key, place, saved))
                    data = narrowed(block.data, within(common, block.box))
                    item.parts.append(Block(within(common, chunk.box), data))
    return sorted(items.values(), key=lambda item: item.place)


class VerifiedItems(VerifiedRead):
    """The reads of one rank from a DCP checkpoint, verified by the CRC-32s in its archives."""

    def __init__(self, storage: Storage, directory: str, items: Sequence[StockItem]) -> None:
        sizes = [part.box.numel * item.saved.dtype.itemsize for item in items for part in item.parts]
        super().__init__(storage, directory, sum(sizes))
        self._items = items
        # A view of a live tensor, the dtype of the stored elements, the position of their bytes in the spool.
        self._positions: list[tuple[Tensor, torch.dtype, int]] = []

    def read(self, progress: Progress) -> None:
        for target, source in self._read():
            if not self._storage.is_local:
                self._positions.append((target, source.dtype, self._append(memory(as_bits(source).contiguous()))))
            progress.add(source.numel() * source.element_size())

    def apply(self, progress: Progress) -> None:
        for target, source in self._read() if self._storage.is_local else self._spooled():
            copy_rounded(target, source)
            progress.add(source.numel() * source.element_size())

    def _read(self) -> Iterator[tuple[Tensor, Tensor]]:
        return _targets_and_sources(self._storage, self._directory, self._items)

    def _spooled(self) -> Iterator[tuple[Tensor, Tensor]]:
        for target, dtype, position in self._positions:
            source = torch.empty(target.shape, dtype=dtype, device="cpu")
            view = memory(source)
            view[:] = self._read_back(position, len(view))
            yield target, source


def read_items_into(storage: Storage, directory: str, items: Sequence[StockItem]) -> None:
    """Reads, verifies and copies item by item. Not collective.

    Raises:
        CheckpointError: an item is damaged. The tensors are filled in part then, so they must not be live state.
    """
    for target, source in _targets_and_sources(storage, directory, items):
        copy_rounded(target, source)


def _targets_and_sources(
    storage: Storage, directory: str, items: Sequence[StockItem]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (view of a live tensor, the elements that belong there) for all parts of the items.

    The elements of a large item are yielded before the whole item is verified. If it is damaged, ``CheckpointError`` is
    raised when the iteration goes on.
    """
    for item, box, found in _read(storage, directory, items):
        for part in item.parts:
            common = intersection(part.box, box)
            if common is not None:
                yield narrowed(part.data, within(common, part.box)), narrowed(found, within(common, box))


def _read(storage: Storage, directory: str, items: Sequence[StockItem]) -> Iterator[tuple[StockItem, Box, Tensor]]:
    """Yields (item, box of its chunk, elements of the box): a small item at once, a large one in several boxes."""
    small = [item for item in items if not item.is_large]
    for index, data in read_joined(storage, directory, [item.place for item in small], READ_BYTES, GAP):
        yield small[index], whole(small[index].saved.shape), _small_item(small[index], data)
    for item in items:
        if item.is_large:
            for box, part in _large_item(storage, directory, item):
                yield item, box, part


def read_objects(storage: Storage, directory: str, objects: Mapping[str, StoredObject]) -> dict[str, bytes]:
    """Returns the items of values by key, without verifying them: whoever decodes an item does. Not collective."""
    keys = sorted(objects, key=lambda key: range_of(objects[key]))
    ranges = [range_of(objects[key]) for key in keys]
    return {keys[index]: data for index, data in read_joined(storage, directory, ranges, READ_BYTES, GAP)}


def _small_item(item: StockItem, data: bytes) -> Tensor:
    with naming(item.damage):
        return item_tensor(data, item.saved.dtype, item.saved.shape)


def _large_item(storage: Storage, directory: str, item: StockItem) -> Iterator[tuple[Box, Tensor]]:
    """Yields (box of the chunk, its elements) while it reads an item in bounded memory; verifies it at the end."""
    name, start, stop = item.place
    path = in_directory(directory, name)
    with FileRange(storage, path, start, stop) as raw, naming(item.damage):
        layout = item_layout(cast(BinaryIO, io.BufferedReader(raw)), stop - start, item.saved)
    order = _dense_order(item.saved.shape, layout.strides)
    if order is None:  # torch never writes such items: it copies a tensor that has gaps in its memory first
        ((_, data),) = storage.read_ranges([(path, start, stop)])
        yield whole(item.saved.shape), _small_item(item, data)
        return
    first = start + layout.start
    crc, at = 0, 0
    for data in _pieces(storage, path, first, first + layout.nbytes):
        crc = crc32(data, crc)
        yield from _boxes_in(item.saved, layout, order, at, data)
        at += len(data)
    if crc != layout.crc32:
        raise CheckpointError(f"{item.damage}: its elements do not have the CRC-32 that was saved with them{CRC_HINT}")


def _pieces(storage: Storage, path: str, start: int, stop: int) -> Iterator[bytes]:
    """Yields a range of a file in order, in pieces of ``READ_BYTES``."""
    pieces = [(path, at, min(at + READ_BYTES, stop)) for at in range(start, stop, READ_BYTES)]
    for first in range(0, len(pieces), READS_AHEAD):
        found = dict(storage.read_ranges(pieces[first : first + READS_AHEAD]))
        for number in range(len(found)):
            yield found.pop(number)


def _dense_order(shape: Sequence[int], found: Sequence[int]) -> list[int] | None:
    """Returns the order of dims in which the elements are row-major without gaps; None if there is no such order.

    Args:
        found: strides of the stored tensor, in elements.
    """
    order = sorted(range(len(shape)), key=lambda dim: -found[dim] if shape[dim] > 1 else -(2**63))
    expected = strides([shape[dim] for dim in order])
    is_dense = all(found[dim] == step for dim, step in zip(order, expected, strict=True) if shape[dim] > 1)
    return order if is_dense else None


def _boxes_in(
    saved: SavedTensor, layout: Layout, order: Sequence[int], at: int, data: bytes
) -> Iterator[tuple[Box, Tensor]]:
    """Yields (box of the chunk, its elements) for a piece of the payload.

    Args:
        order: of the dims, as ``_dense_order`` returns it.
        at: bytes of the payload before ``data``.
        data: the piece.
    """
    flat = torch.empty(len(data), dtype=torch.uint8, device="cpu")
    memory(flat)[:] = data
    shape = [saved.shape[dim] for dim in order]
    back = sorted(range(len(order)), key=lambda place: order[place])
    start = at // saved.dtype.itemsize - layout.offset
    elements = flat.view(saved.dtype)
    low, high = max(start, 0), min(start + elements.numel(), whole(shape).numel)
    for box in boxes(shape, low, high):
        part = elements[low - start : low - start + box.numel].view(box.sizes)
        yield Box(tuple(box.offsets[n] for n in back), tuple(box.sizes[n] for n in back)), part.permute(back)
        low += box.numel
