"""Reads just what a rank needs of a checkpoint of ``torch.distributed.checkpoint`` (DCP): whole items, verified.

An item has one CRC-32 of all its elements, so whoever needs one of them has to read all. Of a store only those that
are needed wait until all ranks have verified theirs.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, cast

import torch
from torch import Tensor

from dist_asgd.boxes import Box, boxes, intersection, strides, whole, within
from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.format.dcp_metadata import StoredObject
from dist_asgd.checkpoint.format.entries import SavedTensor, TensorEntry
from dist_asgd.checkpoint.format.manifest import in_directory
from dist_asgd.checkpoint.format.tensor_bytes import memory, narrowed
from dist_asgd.checkpoint.loading.ranges import ByteRange, FileRange, joined
from dist_asgd.checkpoint.loading.spool import Verified
from dist_asgd.checkpoint.progress import Progress
from dist_asgd.checkpoint.stock.items import CRC_HINT, Layout, item_layout, item_tensor
from dist_asgd.checkpoint.stock.metadata import StockTensor
from dist_asgd.checkpoint.storage.storage import Storage

READ_BYTES = 8 * 2**20  # bytes that are read at once; larger items are read piece by piece
READS_AHEAD = 4  # pieces
GAP = 2**14  # bytes that are rather read than left out by another request


@dataclass(frozen=True, slots=True)
class ItemBox:
    box: Box  # in the chunk
    data: Tensor  # where it goes, of the box's sizes


@dataclass(frozen=True, slots=True)
class StockItem:
    """A chunk of a tensor with everything that is needed of it."""

    key: str
    place: ByteRange
    saved: SavedTensor  # of the chunk
    needs: list[ItemBox] = field(default_factory=list)

    @property
    def is_large(self) -> bool:
        return self.place[2] - self.place[1] > READ_BYTES


def plan_items(tensors: Mapping[str, StockTensor], wanted: Iterable[tuple[str, TensorEntry]]) -> list[StockItem]:
    """The items that fill the blocks of ``wanted``: keys, with tensors of their shapes. They come by their places."""
    items: dict[tuple[ByteRange, SavedTensor], StockItem] = {}
    for key, entry in wanted:
        for chunk in tensors[key].chunks:
            place = chunk.path, chunk.offset, chunk.offset + chunk.length
            saved = SavedTensor(chunk.box.sizes, tensors[key].saved.dtype)
            for block in entry.blocks:
                common = intersection(chunk.box, block.box)
                if common is not None:
                    item = items.setdefault((place, saved), StockItem(key, place, saved))
                    data = narrowed(block.data, within(common, block.box))
                    item.needs.append(ItemBox(within(common, chunk.box), data))
    return sorted(items.values(), key=lambda item: item.place)


class VerifiedItems(Verified):
    """The items, by the CRC-32s in their archives."""

    def __init__(self, storage: Storage, directory: str, items: Sequence[StockItem]) -> None:
        needs = [need.data for item in items for need in item.needs]
        super().__init__(storage, directory, sum(data.numel() * data.element_size() for data in needs))
        self._items = items
        self._places: list[tuple[Tensor, int]] = []  # where it goes, and where it is kept

    def read(self, progress: Progress) -> None:
        for target, source in self._found():
            if not self._storage.is_local:
                self._places.append((target, self._keep(memory(source.contiguous()))))
            progress.add(source.numel() * source.element_size())

    def apply(self, progress: Progress) -> None:
        for target, source in self._found() if self._storage.is_local else self._read_again():
            target.copy_(source)
            progress.add(source.numel() * source.element_size())

    def _found(self) -> Iterator[tuple[Tensor, Tensor]]:
        return _parts(self._storage, self._directory, self._items)

    def _read_again(self) -> Iterator[tuple[Tensor, Tensor]]:
        for target, at in self._places:
            source = torch.empty(target.shape, dtype=target.dtype, device="cpu")
            view = memory(source)
            view[:] = self._kept(at, len(view))
            yield target, source


def read_items_into(storage: Storage, directory: str, items: Sequence[StockItem]) -> None:
    """Reads, verifies and writes item by item: for tensors that nobody looks at if it raises ``CheckpointError``."""
    for target, source in _parts(storage, directory, items):
        target.copy_(source)


def _parts(storage: Storage, directory: str, items: Sequence[StockItem]) -> Iterator[tuple[Tensor, Tensor]]:
    """(where it goes, what goes there) of each part of each need. An item is verified when the next one comes.

    Raises CheckpointError for a damaged one, which parts may have been yielded of.
    """
    for item, box, found in _read(storage, directory, items):
        for need in item.needs:
            common = intersection(need.box, box)
            if common is not None:
                yield narrowed(need.data, within(common, need.box)), narrowed(found, within(common, box))


def _read(storage: Storage, directory: str, items: Sequence[StockItem]) -> Iterator[tuple[StockItem, Box, Tensor]]:
    """Each item in parts: a box of the chunk, and its elements."""
    small = [item for item in items if not item.is_large]
    requests = joined([item.place for item in small], READ_BYTES, GAP)
    ranges = [(in_directory(directory, name), start, stop) for (name, start, stop), _ in requests]
    for index, data in storage.read_ranges(ranges):
        (_, first, _), numbers = requests[index]
        for item in (small[number] for number in numbers):
            _, start, stop = item.place
            yield item, whole(item.saved.shape), _whole(item, data[start - first : stop - first])
    for item in items:
        if item.is_large:
            for box, part in _large(storage, directory, item):
                yield item, box, part


def read_objects(storage: Storage, directory: str, objects: Mapping[str, StoredObject]) -> dict[str, bytes]:
    """The items of values, not verified."""
    keys = sorted(objects, key=lambda key: (objects[key].path, objects[key].offset))
    places = [(o.path, o.offset, o.offset + o.length) for o in (objects[key] for key in keys)]
    requests = joined(places, READ_BYTES, GAP)
    found = {}
    ranges = [(in_directory(directory, name), start, stop) for (name, start, stop), _ in requests]
    for index, data in storage.read_ranges(ranges):
        (_, first, _), numbers = requests[index]
        for number in numbers:
            _, start, stop = places[number]
            found[keys[number]] = data[start - first : stop - first]
    return found


def _whole(item: StockItem, data: bytes) -> Tensor:
    try:
        return item_tensor(data, item.saved.dtype, item.saved.shape)
    except CheckpointError as error:
        raise _damaged(item, error) from error


def _large(storage: Storage, directory: str, item: StockItem) -> Iterator[tuple[Box, Tensor]]:
    name, start, stop = item.place
    path = in_directory(directory, name)
    with FileRange(storage, path, start, stop) as raw:
        try:
            layout = item_layout(cast(BinaryIO, io.BufferedReader(raw)), stop - start, item.saved)
        except CheckpointError as error:
            raise _damaged(item, error) from error
    order = _dense_order(item.saved.shape, layout.strides)
    if order is None:  # torch's writers do not make such: they copy what does not fill its memory
        ((_, data),) = storage.read_ranges([(path, start, stop)])
        yield whole(item.saved.shape), _whole(item, data)
        return
    first = start + layout.start
    crc, at = 0, 0
    for data in _in_order(storage, path, first, first + layout.nbytes):
        crc = zlib.crc32(data, crc)
        yield from _boxes(item.saved, layout, order, at, data)
        at += len(data)
    if crc != layout.crc32:
        raise _damaged(item, f"its elements do not have the CRC-32 that was saved with them{CRC_HINT}")


def _in_order(storage: Storage, path: str, start: int, stop: int) -> Iterator[bytes]:
    pieces = [(path, at, min(at + READ_BYTES, stop)) for at in range(start, stop, READ_BYTES)]
    for first in range(0, len(pieces), READS_AHEAD):
        found = dict(storage.read_ranges(pieces[first : first + READS_AHEAD]))
        for number in range(len(found)):
            yield found.pop(number)


def _dense_order(shape: Sequence[int], found: Sequence[int]) -> list[int] | None:
    """The order of the dims in which the elements are row-major; None if they are in none."""
    order = sorted(range(len(shape)), key=lambda dim: -found[dim] if shape[dim] > 1 else -(2**63))
    expected = strides([shape[dim] for dim in order])
    is_dense = all(found[dim] == step for dim, step in zip(order, expected, strict=True) if shape[dim] > 1)
    return order if is_dense else None


def _boxes(
    saved: SavedTensor, layout: Layout, order: Sequence[int], at: int, data: bytes
) -> Iterator[tuple[Box, Tensor]]:
    """The elements in ``data``, which are those from byte ``at`` of the payload on."""
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


def _damaged(item: StockItem, error: object) -> CheckpointError:
    name, start, stop = item.place
    return CheckpointError(f"{name} is damaged: bytes {start} to {stop}, of {item.key!r}: {error}")
