"""Verification of a whole checkpoint, for ``dist-asgd verify``: reads every byte and lists all faults.

Takes checkpoints of this library and of ``torch.distributed.checkpoint`` (DCP), in bounded memory. Runs in one process.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, cast

from dist_asgd.checkpoint.errors import CheckpointError, NotCommitted
from dist_asgd.checkpoint.format.dcp_metadata import stored_chunk
from dist_asgd.checkpoint.format.entries import SavedTensor
from dist_asgd.checkpoint.format.json_values import decode
from dist_asgd.checkpoint.format.manifest import MANIFEST, STOCK, Item, Manifest, in_directory, read_manifest
from dist_asgd.checkpoint.loading.ranges import READ_BYTES, ByteRange, FileRange, range_of, read_joined, read_record
from dist_asgd.checkpoint.stock.items import check_item
from dist_asgd.checkpoint.stock.metadata import StockCheckpoint, read_stock_metadata
from dist_asgd.checkpoint.storage.storage import Storage

ProgressCallback = Callable[[int, int], None]  # bytes verified since the last call, bytes in all
Damage = tuple[str, int, int, str, str]  # file, start, stop, what is wrong, key


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    """Something that is wrong in one file of a checkpoint."""

    file: str
    key: str  # of the entry that is affected; "" if there is none
    text: str


@dataclass(frozen=True, slots=True)
class ItemBlocks:
    """Some blocks of an item in the manifest, which has their checksums."""

    key: str
    item: Item
    blocks: range

    @property
    def place(self) -> ByteRange:
        """The bytes to read: the blocks, with the item's head or tail where they are its first or last."""
        return self.item.file, *self.item.reach(self.blocks)

    def damages(self, file: BinaryIO) -> Iterator[Damage]:
        """Yields the damaged parts of ``file``, which has the bytes at ``place``."""
        for start, stop in self.item.damages(self.blocks, memoryview(file.read())):
            yield self.item.file, start, stop, f"do not have the checksum that {MANIFEST} has of them", self.key


@dataclass(frozen=True, slots=True)
class StockArchive:
    """A zip archive with CRC-32s of its own: an item of a DCP checkpoint, or of a value in one of this library."""

    key: str
    place: ByteRange
    expected: SavedTensor | None  # shape and dtype of a tensor's chunk; None for a value

    def damages(self, file: BinaryIO) -> Iterator[Damage]:
        """Yields the damage of ``file``, which has the bytes at ``place``, if there is any."""
        name, start, stop = self.place
        try:
            check_item(file, stop - start, self.expected)
        except CheckpointError as error:
            yield name, start, stop, f"are no sound item: {error}", self.key


Verifiable = ItemBlocks | StockArchive


def verify_checkpoint(storage: Storage, directory: str, report: ProgressCallback) -> list[Fault]:
    """Returns all faults of a checkpoint of this library, sorted. Reads every byte of its files.

    Args:
        directory: relative to ``storage``; "" if the storage is that of one checkpoint. It must have a manifest.json.
        report: called after each verified range.

    Raises:
        OSError: the storage failed, or there is no ``manifest.json``.
    """
    sizes = storage.sizes(directory)
    try:
        manifest = read_manifest(read_record(storage, directory, MANIFEST, sizes))
    except CheckpointError as error:
        return [Fault(MANIFEST, "", f"{error}. Without it, nothing else can be verified")]
    faults = [*_check_files(manifest, sizes), *_check_values(manifest)]
    present = {name for name, file in manifest.files.items() if sizes.get(name) == file.size}
    stock = None
    if STOCK in present:
        stock, problems = _read_committed_stock(storage, directory, manifest, sizes)
        faults += problems
    parts = [part for part in _parts(manifest, stock) if part.place[0] in present]
    if stock is not None:
        faults += [*_check_stock_agrees(manifest, stock), *_check_coverage(manifest, parts, present)]
    return sorted(faults + _check_bytes(storage, directory, parts, report))


def verify_stock_checkpoint(storage: Storage, directory: str, report: ProgressCallback) -> list[Fault]:
    """Returns all faults of a checkpoint of ``torch.distributed.checkpoint``, by the CRC-32s in its archives, sorted.

    Args:
        directory: relative to ``storage``; "" if the storage is that of one checkpoint.
        report: called after each verified range.

    Raises:
        NotCommitted: it is a checkpoint of this library, and has no manifest.json.
        OSError: the storage failed, or there is no ``.metadata``.
    """
    sizes = storage.sizes(directory)
    stock, faults = _read_stock(read_record(storage, directory, STOCK, sizes), committed=False)
    parts = []
    for part in _archives(stock) if stock is not None else ():
        name, _, stop = part.place
        if stop > sizes.get(name, -1):
            found = f"has {sizes[name]} bytes, and {stop} are needed" if name in sizes else "is missing"
            faults.append(Fault(name, part.key, f"the file {found}"))
        else:
            parts.append(part)
    return sorted(faults + _check_bytes(storage, directory, parts, report))


def _read_stock(data: bytes, committed: bool) -> tuple[StockCheckpoint | None, list[Fault]]:
    """Returns the contents of ``.metadata``, or None and the fault that makes it unreadable."""
    try:
        return read_stock_metadata(data, committed=committed), []
    except NotCommitted:
        raise
    except CheckpointError as error:
        return None, [Fault(STOCK, "", str(error))]


def _read_committed_stock(
    storage: Storage, directory: str, manifest: Manifest, sizes: Mapping[str, int]
) -> tuple[StockCheckpoint | None, list[Fault]]:
    """Returns the contents of the ``.metadata`` beside a manifest, or None and the fault that makes it unreadable."""
    try:
        data = read_record(storage, directory, STOCK, sizes)
    except CheckpointError as error:
        return None, [Fault(STOCK, "", str(error))]
    if hashlib.sha256(data).hexdigest() != manifest.files[STOCK].sha256:
        return None, [Fault(STOCK, "", f"it does not have the sha256 that {MANIFEST} has of it")]
    return _read_stock(data, committed=True)


def _check_files(manifest: Manifest, sizes: Mapping[str, int]) -> Iterator[Fault]:
    for name, file in manifest.files.items():
        if name not in sizes:
            yield Fault(name, "", "the file is missing")
        elif sizes[name] != file.size:
            yield Fault(name, "", f"the file has {sizes[name]} bytes, and should have {file.size}")
    for name in sizes.keys() - manifest.files.keys() - {MANIFEST}:
        yield Fault(name, "", "the file does not belong to the checkpoint")


def _check_values(manifest: Manifest) -> Iterator[Fault]:
    for key, value in manifest.values.items():
        try:
            decode(value.encoded, key)
        except CheckpointError as error:
            yield Fault(MANIFEST, key, str(error))


def _check_stock_agrees(manifest: Manifest, stock: StockCheckpoint) -> Iterator[Fault]:
    """Yields faults where ``.metadata`` and the manifest differ."""
    for key, tensor in manifest.tensors.items():
        theirs = stock.tensors.get(key)
        chunks = {stored_chunk(chunk.box, manifest.items[chunk.item]) for chunk in tensor.chunks if chunk.box.numel}
        if theirs is None:
            yield Fault(STOCK, key, f"it lacks the tensor, which {MANIFEST} has")
        elif theirs.saved != tensor.saved or set(theirs.chunks) != chunks:
            yield Fault(STOCK, key, f"it has another shape, dtype or place of the tensor than {MANIFEST}")
    paths = [*(tensor.path for tensor in manifest.tensors.values()), *(v.path for v in manifest.values.values())]
    above = {path[:depth] for path in paths for depth in range(1, len(path))}
    expected = {key for key, value in manifest.values.items() if value.path not in above}  # outlines are not there
    for key in expected - stock.objects.keys():
        yield Fault(STOCK, key, f"it lacks the value, which {MANIFEST} has")
    for key in (stock.tensors.keys() - manifest.tensors.keys()) | (stock.objects.keys() - manifest.values.keys()):
        yield Fault(STOCK, key, f"{MANIFEST} lacks the entry")


def _parts(manifest: Manifest, stock: StockCheckpoint | None) -> list[Verifiable]:
    """Returns everything to verify in the files with items, sorted by place, each at most about ``READ_BYTES``.

    Tensors are found by the manifest, values by ``.metadata``, unless an item of the manifest covers them.
    """
    keys = {chunk.item: key for key, tensor in manifest.tensors.items() for chunk in tensor.chunks}
    parts: list[Verifiable] = []
    for number, item in enumerate(manifest.items):
        parts += [ItemBlocks(keys.get(number, ""), item, blocks) for blocks in item.block_ranges(READ_BYTES)]
    if stock is not None:
        whole = [item for number, item in enumerate(manifest.items) if number not in keys]  # these hold values
        parts += [part for part in _archives(stock) if part.expected is None and not _is_in(part, whole)]
    return sorted(parts, key=lambda part: part.place)


def _is_in(part: StockArchive, items: Sequence[Item]) -> bool:
    file, start, stop = part.place
    return any(item.file == file and item.offset <= start and stop <= item.stop for item in items)


def _archives(stock: StockCheckpoint) -> list[StockArchive]:
    """Returns the archives of all entries, sorted by place. An archive that several entries share is listed once."""
    found = {}
    for key, tensor in stock.tensors.items():
        for chunk in tensor.chunks:
            place = range_of(chunk)
            found[place] = StockArchive(key, place, SavedTensor(chunk.box.sizes, tensor.saved.dtype))
    for key, stored in stock.objects.items():
        found[range_of(stored)] = StockArchive(key, range_of(stored), None)
    return sorted(found.values(), key=lambda part: part.place)


def _check_coverage(manifest: Manifest, parts: Sequence[Verifiable], present: set[str]) -> Iterator[Fault]:
    """Yields a fault for each range of a file that belongs to no entry, or to several."""
    ends = dict.fromkeys(present, 0)
    for part in parts:
        name, start, stop = part.place
        if start != ends[name]:
            what = "belong to nothing" if start > ends[name] else "belong to several items"
            low, high = sorted((start, ends[name]))
            yield Fault(name, part.key, f"bytes {low} to {high} {what}")
        ends[name] = max(stop, ends[name])
    for name, end in ends.items():
        if name != STOCK and end != manifest.files[name].size:
            yield Fault(name, "", f"bytes {end} to {manifest.files[name].size} belong to nothing")


def _check_bytes(
    storage: Storage, directory: str, parts: Sequence[Verifiable], report: ProgressCallback
) -> list[Fault]:
    """Reads and verifies the parts, which are sorted by place. Returns their damage."""
    total = sum(part.place[2] - part.place[1] for part in parts)
    damages: list[Damage] = []
    small = [part for part in parts if not _is_large(part)]
    for index, data in read_joined(storage, directory, [part.place for part in small], READ_BYTES):
        damages += small[index].damages(io.BytesIO(data))
        report(len(data), total)
    for part in parts:
        if isinstance(part, StockArchive) and _is_large(part):
            name, start, stop = part.place
            with FileRange(storage, in_directory(directory, name), start, stop) as raw:
                damages += part.damages(cast(BinaryIO, io.BufferedReader(raw, READ_BYTES)))
            report(stop - start, total)
    return _merged(sorted(damages))


def _is_large(part: Verifiable) -> bool:
    """Returns whether a part is read as a stream."""
    return isinstance(part, StockArchive) and part.place[2] - part.place[1] > 2 * READ_BYTES


def _merged(damages: Sequence[Damage]) -> list[Fault]:
    """Returns the faults, with adjacent damaged ranges of one entry as one fault."""
    merged: list[Damage] = []
    for file, start, stop, text, key in damages:
        if merged and merged[-1][0] == file and merged[-1][2:] == (start, text, key):
            merged[-1] = (file, merged[-1][1], stop, text, key)
        else:
            merged.append((file, start, stop, text, key))
    return [Fault(file, key, f"bytes {start} to {stop} {text}") for file, start, stop, text, key in merged]
