"""Reads all of a checkpoint, ours or stock, in bounded memory, and tells everything that is wrong with it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, cast

from dist_asgd.checkpoint.errors import CheckpointError, NotCommitted
from dist_asgd.checkpoint.format.dcp_metadata import StoredChunk
from dist_asgd.checkpoint.format.entries import SavedTensor
from dist_asgd.checkpoint.format.json_values import decode
from dist_asgd.checkpoint.format.manifest import NAME, STOCK, Chunk, Item, Manifest, in_directory, read_manifest
from dist_asgd.checkpoint.loading.ranges import ByteRange, FileRange, joined
from dist_asgd.checkpoint.stock.items import check_item
from dist_asgd.checkpoint.stock.metadata import StockCheckpoint, read_stock_metadata
from dist_asgd.checkpoint.storage.storage import Storage

READ_BYTES = 8 * 2**20  # bytes that are read together

Report = Callable[[int, int], None]  # bytes that were verified just now, of how many in all


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    file: str
    key: str  # of the entry; "" where it is none's
    text: str


@dataclass(frozen=True, slots=True)
class ItemBlocks:
    """Of an item in a manifest."""

    key: str
    item: Item
    blocks: range

    @property
    def place(self) -> ByteRange:
        return self.item.file, *self.item.reach(self.blocks)

    def damages(self, data: bytes) -> Iterator[tuple[int, int, str]]:
        """(start, stop, what is wrong) of parts of the file, of which ``data`` is that at ``place``."""
        for start, stop in self.item.damages(self.blocks, memoryview(data)):
            yield start, stop, f"do not have the checksum that {NAME} has of them"


@dataclass(frozen=True, slots=True)
class StockArchive:
    """An item of a stock checkpoint, and of a value in ours: it has checksums of its own."""

    key: str
    place: ByteRange
    expected: SavedTensor | None

    def damages(self, data: bytes) -> Iterator[tuple[int, int, str]]:
        """As Blocks' are."""
        return self.damages_of(io.BytesIO(data))

    def damages_of(self, file: BinaryIO) -> Iterator[tuple[int, int, str]]:
        _, start, stop = self.place
        try:
            check_item(file, stop - start, self.expected)
        except CheckpointError as error:
            yield start, stop, f"are no sound item: {error}"


Verifiable = ItemBlocks | StockArchive
Damage = tuple[str, int, int, str, str]  # file, start, stop, what is wrong, key


def verify_checkpoint(storage: Storage, directory: str, report: Report) -> list[Fault]:
    """What is wrong with a checkpoint that has a manifest. Every byte of it is read. Raises ``StorageError``."""
    sizes = storage.sizes(directory)
    try:
        manifest = read_manifest(storage.read(in_directory(directory, NAME)))
    except CheckpointError as error:
        return [Fault(NAME, "", f"{error}. Without it, nothing else can be verified")]
    faults = [*_files(manifest, sizes), *_values(manifest)]
    present = {name for name, file in manifest.files.items() if sizes.get(name) == file.size}
    stock = None
    if STOCK in present:
        data = storage.read(in_directory(directory, STOCK))
        if hashlib.sha256(data).hexdigest() == manifest.files[STOCK].sha256:
            stock, problem = _stock(data, committed=True)
            faults += problem
        else:
            faults.append(Fault(STOCK, "", f"it does not have the sha256 that {NAME} has of it"))
    if stock is not None:
        faults += _disagreements(manifest, stock)
    parts = [part for part in _parts(manifest, stock) if part.place[0] in present]
    faults += _uncovered(manifest, parts, present) if stock is not None else []
    return sorted(faults + _damages(storage, directory, parts, report))


def verify_stock_checkpoint(storage: Storage, directory: str, report: Report) -> list[Fault]:
    """The same for a checkpoint of ``torch.distributed.checkpoint``, by the CRC-32s in its archives.

    Raises ``NotCommitted`` for one of ours.
    """
    sizes = storage.sizes(directory)
    stock, faults = _stock(storage.read(in_directory(directory, STOCK)), committed=False)
    parts = []
    for part in _archives(stock) if stock is not None else ():
        name, _, stop = part.place
        if stop > sizes.get(name, -1):
            found = f"has {sizes[name]} bytes, and {stop} are needed" if name in sizes else "is missing"
            faults.append(Fault(name, part.key, f"the file {found}"))
        else:
            parts.append(part)
    return sorted(faults + _damages(storage, directory, parts, report))


def _stock(data: bytes, committed: bool) -> tuple[StockCheckpoint | None, list[Fault]]:
    try:
        return read_stock_metadata(data, committed=committed), []
    except NotCommitted:
        raise
    except CheckpointError as error:
        return None, [Fault(STOCK, "", str(error))]


def _files(manifest: Manifest, sizes: Mapping[str, int]) -> Iterator[Fault]:
    for name, file in manifest.files.items():
        if name not in sizes:
            yield Fault(name, "", "the file is missing")
        elif sizes[name] != file.size:
            yield Fault(name, "", f"the file has {sizes[name]} bytes, and should have {file.size}")
    for name in sizes.keys() - manifest.files.keys() - {NAME}:
        yield Fault(name, "", "the file does not belong to the checkpoint")


def _values(manifest: Manifest) -> Iterator[Fault]:
    for key, value in manifest.values.items():
        try:
            decode(value.encoded, key)
        except CheckpointError as error:
            yield Fault(NAME, key, str(error))


def _disagreements(manifest: Manifest, stock: StockCheckpoint) -> Iterator[Fault]:
    """Where ``.metadata`` says something else than the manifest."""
    for key, tensor in manifest.tensors.items():
        theirs = stock.tensors.get(key)
        chunks = {_stored(manifest, chunk) for chunk in tensor.chunks if chunk.box.numel}
        if theirs is None:
            yield Fault(STOCK, key, f"it lacks the tensor, which {NAME} has")
        elif theirs.saved != tensor.saved or set(theirs.chunks) != chunks:
            yield Fault(STOCK, key, f"it has another shape, dtype or place of the tensor than {NAME}")
    for key in manifest.values.keys() - stock.objects.keys():
        yield Fault(STOCK, key, f"it lacks the value, which {NAME} has")
    for key in (stock.tensors.keys() - manifest.tensors.keys()) | (stock.objects.keys() - manifest.values.keys()):
        yield Fault(STOCK, key, f"{NAME} lacks the entry")


def _stored(manifest: Manifest, chunk: Chunk) -> StoredChunk:
    item = manifest.items[chunk.item]
    return StoredChunk(chunk.box, item.file, item.offset, item.stop - item.offset)


def _parts(manifest: Manifest, stock: StockCheckpoint | None) -> list[Verifiable]:
    """All bytes of the files with items, in their order: tensors by the manifest, values by ``.metadata``."""
    keys = {chunk.item: key for key, tensor in manifest.tensors.items() for chunk in tensor.chunks}
    parts: list[Verifiable] = []
    for number, item in enumerate(manifest.items):
        count = -(-item.size // item.block)
        step = max(1, READ_BYTES // item.block)
        for start in range(0, max(count, 1), step):
            parts.append(ItemBlocks(keys.get(number, ""), item, range(start, min(start + step, count))))
    if stock is not None:
        whole = [item for number, item in enumerate(manifest.items) if number not in keys]  # have values, too
        parts += [part for part in _archives(stock) if part.expected is None and not _is_in(part, whole)]
    return sorted(parts, key=lambda part: part.place)


def _is_in(part: StockArchive, items: Sequence[Item]) -> bool:
    file, start, stop = part.place
    return any(item.file == file and item.offset <= start and stop <= item.stop for item in items)


def _archives(stock: StockCheckpoint) -> list[StockArchive]:
    """In the order of their places; what several entries share stands once."""
    found = {}
    for key, tensor in stock.tensors.items():
        for chunk in tensor.chunks:
            place = chunk.path, chunk.offset, chunk.offset + chunk.length
            found[place] = StockArchive(key, place, SavedTensor(chunk.box.sizes, tensor.saved.dtype))
    for key, stored in stock.objects.items():
        place = stored.path, stored.offset, stored.offset + stored.length
        found[place] = StockArchive(key, place, None)
    return sorted(found.values(), key=lambda part: part.place)


def _uncovered(manifest: Manifest, parts: Sequence[Verifiable], present: set[str]) -> Iterator[Fault]:
    """Bytes of files that belong to no entry, or to several."""
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


def _damages(storage: Storage, directory: str, parts: Sequence[Verifiable], report: Report) -> list[Fault]:
    """Reads the parts, which stand in the order of their places."""
    total = sum(part.place[2] - part.place[1] for part in parts)
    damages: list[Damage] = []
    small = [part for part in parts if not _is_large(part)]
    requests = joined([part.place for part in small], READ_BYTES)
    ranges = [(in_directory(directory, name), start, stop) for (name, start, stop), _ in requests]
    for index, data in storage.read_ranges(ranges):
        (name, first, _), indices = requests[index]
        for part in (small[number] for number in indices):
            _, start, stop = part.place
            found = part.damages(data[start - first : stop - first])
            damages += [(name, low, high, text, part.key) for low, high, text in found]
        report(len(data), total)
    for part in parts:
        if isinstance(part, StockArchive) and _is_large(part):
            name, start, stop = part.place
            with FileRange(storage, in_directory(directory, name), start, stop) as raw:
                file = cast(BinaryIO, io.BufferedReader(raw, READ_BYTES))
                damages += [(name, low, high, text, part.key) for low, high, text in part.damages_of(file)]
            report(stop - start, total)
    return _merged(sorted(damages))


def _is_large(part: Verifiable) -> bool:
    return isinstance(part, StockArchive) and part.place[2] - part.place[1] > 2 * READ_BYTES


def _merged(damages: Sequence[Damage]) -> list[Fault]:
    """Damages that follow on each other are one."""
    merged: list[Damage] = []
    for file, start, stop, text, key in damages:
        if merged and merged[-1][0] == file and merged[-1][2:] == (start, text, key):
            merged[-1] = (file, merged[-1][1], stop, text, key)
        else:
            merged.append((file, start, stop, text, key))
    return [Fault(file, key, f"bytes {start} to {stop} {text}") for file, start, stop, text, key in merged]
