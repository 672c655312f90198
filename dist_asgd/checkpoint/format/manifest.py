"""Writes and reads ``manifest.json``, the commit record of a checkpoint: its entries, their places and checksums.

docs/checkpoint-format.md documents the file format. Reading trusts nothing: every statement of a manifest is checked
before it is used, and errors are ``CheckpointError``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from dist_asgd.boxes import Box, tiles
from dist_asgd.checkpoint.errors import CheckpointError, DamagedCheckpoint
from dist_asgd.checkpoint.format.crc32 import crc32
from dist_asgd.checkpoint.format.dtypes import DTYPES
from dist_asgd.checkpoint.format.entries import SavedTensor, dtype_name
from dist_asgd.checkpoint.format.manifest_rules import (
    EntryPlace,
    FormatError,
    check_lengths,
    check_overlaps,
    check_paths,
)

MANIFEST = "manifest.json"  # the file whose creation commits a checkpoint
STOCK = ".metadata"  # the file that torch.distributed.checkpoint reads

FORMAT = "dist_asgd checkpoint"
VERSION = 1  # of the format that is written
READER = 1  # the oldest version of a reader that understands the written format

MAX_MANIFEST = 2**32  # bytes of the file: a million entries have less, with all checksums that their items can have

NO_FRAME = "0" * 16  # the checksums of an empty head and an empty tail
MAX_PATH = 200  # names in the path of an entry
SHARED = 1024  # bytes up to which a payload may be stored once for several tensors
_FILE = re.compile(r"__[0-9]+_[0-9]+\.distcp|\.metadata")
_DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"}\s*\Z')
_ZEROS = b"0" * 64

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Item:
    """A part of a file: an archive of one box of a tensor, which consists of head, payload and tail.

    An item to which no tensor refers holds values for ``torch.distributed.checkpoint`` only.
    """

    file: str
    offset: int  # bytes of the file before the head
    head: int  # bytes
    size: int  # bytes of the payload
    tail: int  # bytes
    block: int  # bytes of the payload that have one checksum; the last block may be shorter
    crc32: str  # 8 hex digits for each block: CRC-32 of the payload from its start to the end of the block
    frame: str  # 16 hex digits: CRC-32 of the head, then that of the tail

    @property
    def start(self) -> int:
        """Bytes of the file before the payload."""
        return self.offset + self.head

    @property
    def stop(self) -> int:
        """Bytes of the file up to the end of the item."""
        return self.start + self.size + self.tail

    def crc_before(self, block: int) -> int:
        """Returns the CRC-32 of the payload before block number ``block``."""
        return int(self.crc32[8 * block - 8 : 8 * block], 16) if block else 0

    def reach(self, blocks: range) -> tuple[int, int]:
        """Returns the bytes ``[start, stop)`` of the file that hold ``blocks``, given by number.

        They include the head, where ``blocks`` begins with the first block, and the tail, where it ends with the last.
        """
        start = self.start + blocks.start * self.block if blocks.start else self.offset
        end = blocks.stop * self.block
        return start, self.start + end if end < self.size else self.stop

    def block_ranges(self, most: int) -> list[range]:
        """Returns the numbers of all blocks in ranges of at most ``most`` bytes of payload, or of a single block."""
        count, step = -(-self.size // self.block), max(1, most // self.block)
        return [range(start, min(start + step, count)) for start in range(0, max(count, 1), step)]

    def damages(self, blocks: range, data: memoryview) -> Iterator[tuple[int, int]]:
        """Yields the bytes ``[start, stop)`` of the file that do not have their checksum.

        Args:
            blocks: numbers of the blocks to verify.
            data: the bytes of ``reach(blocks)``.
        """
        first, last = self.reach(blocks)
        if first == self.offset and crc32(data[: self.head]) != int(self.frame[:8], 16):
            yield self.offset, self.start
        for block in blocks:
            start = self.start + block * self.block
            stop = min(start + self.block, self.start + self.size)
            if crc32(data[start - first : stop - first], self.crc_before(block)) != self.crc_before(block + 1):
                yield start, stop
        end = self.start + self.size
        if last == self.stop and crc32(data[end - first :]) != int(self.frame[8:], 16):
            yield end, self.stop


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, and the item whose payload is its elements."""

    box: Box
    item: int  # index in Manifest.items


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor of a checkpoint."""

    saved: SavedTensor
    chunks: tuple[Chunk, ...]  # each element of the tensor is in exactly one chunk
    path: tuple[str | int, ...]  # in the nested state: names of dicts, positions in lists
    rank: int | None = None  # the rank that had this tensor; None for a tensor of every rank


@dataclass(frozen=True, slots=True)
class ValueRecord:
    """A value of a checkpoint: anything that is no tensor."""

    encoded: Any  # as format/json_values.py encodes it
    path: tuple[str | int, ...]  # in the nested state: names of dicts, positions in lists
    rank: int | None = None  # the rank that had this value; None for a value of every rank


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of a checkpoint."""

    size: int  # bytes
    sha256: str | None = None  # hex digits; None for a file of items, which have checksums of their own


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of ``manifest.json``."""

    step: int
    world_size: int  # ranks that saved
    created: float  # seconds since the epoch
    versions: Mapping[str, str]  # of torch and Python, by name
    files: Mapping[str, FileRecord]  # by path relative to the checkpoint's directory
    items: tuple[Item, ...]
    tensors: Mapping[str, TensorRecord]  # by key
    values: Mapping[str, ValueRecord]  # by key


def in_directory(directory: str, name: str) -> str:
    """Returns the path of a checkpoint's file in a storage.

    Args:
        directory: the checkpoint's directory in the storage; "" where the storage's URL is the checkpoint.
    """
    return "/".join(filter(None, (directory, name)))


def key_of_rank(key: str, rank: int) -> str:
    """Returns the key of ``rank``'s own version of the entry ``key``, where ranks have different ones."""
    return f"{key}@rank{rank}"


def write_manifest(manifest: Manifest) -> bytes:
    """Returns the bytes of ``manifest.json``, whose last member is the SHA-256 of the file with zeros in that place.

    Raises ``CheckpointError`` where they are more than a reader takes.
    """
    record: dict[str, Any] = {"format": FORMAT, "version": VERSION, "reader": READER, "step": manifest.step}
    record |= {"world_size": manifest.world_size, "created": manifest.created, "versions": dict(manifest.versions)}
    record["files"] = {
        name: {"size": file.size} | ({} if file.sha256 is None else {"sha256": file.sha256})
        for name, file in manifest.files.items()
    }
    record["items"] = [
        [item.file, item.offset, item.head, item.size, item.tail, item.block, item.crc32, item.frame]
        for item in manifest.items
    ]
    record["tensors"] = {
        key: {
            "dtype": dtype_name(tensor.saved.dtype),
            "shape": list(tensor.saved.shape),
            "chunks": [[list(chunk.box.offsets), list(chunk.box.sizes), chunk.item] for chunk in tensor.chunks],
            **_path_members(tensor),
        }
        for key, tensor in manifest.tensors.items()
    }
    record["values"] = {key: {"value": value.encoded, **_path_members(value)} for key, value in manifest.values.items()}
    record["sha256"] = _ZEROS.decode()
    data = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
    check_size(len(data))
    return data[: -len(_ZEROS) - 2] + hashlib.sha256(data).hexdigest().encode() + data[-2:]


def _path_members(record: TensorRecord | ValueRecord) -> dict[str, Any]:
    return {"path": list(record.path)} | ({} if record.rank is None else {"rank": record.rank})


def check_size(size: int, name: str = MANIFEST) -> None:
    """Raises ``DamagedCheckpoint`` for a size in bytes that the manifest, or the ``.metadata`` beside it, cannot have.

    A FIFO, a socket and a device have the size 0.
    """
    if size == 0:
        raise DamagedCheckpoint(f"{name} is empty, or it is no regular file")
    if size > MAX_MANIFEST:
        raise DamagedCheckpoint(f"{name} has {size} bytes, expected at most {MAX_MANIFEST}")


def read_manifest(data: bytes) -> Manifest:
    """Returns the manifest in the bytes of ``manifest.json``.

    Raises:
        DamagedCheckpoint: the manifest is not as it was written.
        CheckpointError: the manifest contradicts itself, or needs a later version of this library.
    """
    found = _DIGEST.search(data)
    if found is None:
        raise DamagedCheckpoint(f"{MANIFEST} is not whole: it has no sha256 at its end")
    digest = hashlib.sha256(memoryview(data)[: found.start(1)])
    digest.update(_ZEROS + data[found.end(1) :])
    if digest.hexdigest().encode() != found[1]:
        raise DamagedCheckpoint(f"{MANIFEST} is damaged: its contents do not have the sha256 that stands in it")
    try:
        return _manifest(json.loads(data))
    except FormatError as error:
        raise CheckpointError(f"{MANIFEST} is not valid: {error}") from None
    except (ValueError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{MANIFEST} is not valid: {error}") from error


def _manifest(record: Any) -> Manifest:
    record = _typed(record, dict, "it")
    if record.get("format") != FORMAT:
        raise FormatError(f"its format is {record.get('format')!r}, not {FORMAT!r}")
    reader = _count(record.get("reader"), "reader")
    if reader > VERSION:
        raise FormatError(f"it asks for a reader of version {reader}, and this is version {VERSION}: upgrade dist_asgd")
    files = {name: _file(value, name) for name, value in _members(record, "files")}
    items = tuple(_item(value, files) for value in _typed(record.get("items"), list, "items"))
    if STOCK not in files or files[STOCK].sha256 is None:
        raise FormatError(f"it has no sha256 of {STOCK}")
    check_overlaps((item.file, item.offset, item.stop) for item in items)
    tensors = {key: _tensor(key, value, items) for key, value in _members(record, "tensors")}
    _check_sharing(tensors, items)
    values = {key: _value(key, value) for key, value in _members(record, "values")}
    check_places([(tensor.path, tensor.rank) for tensor in tensors.values()], values)
    return Manifest(
        step=_count(record.get("step"), "step"),
        world_size=_count(record.get("world_size"), "world_size"),
        created=_typed(record.get("created"), (int, float), "created"),
        versions={name: _typed(value, str, f"version of {name}") for name, value in _members(record, "versions")},
        files=files,
        items=items,
        tensors=tensors,
        values=values,
    )


def _members(record: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    return list(_typed(record.get(name), dict, name).items())


def _typed(value: Any, kind: Any, what: str) -> Any:
    """Returns ``value`` if it is an instance of ``kind``; a bool is no int. ``what`` is its name in the error."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        expected = kind.__name__ if isinstance(kind, type) else "number"
        raise FormatError(f"{what} is a {type(value).__name__}, expected a {expected}")
    return value


def _count(value: Any, what: str) -> int:
    number: int = _typed(value, int, what)
    if not 0 <= number < 2**63:
        raise FormatError(f"{what} is {number}")
    return number


def _list_of(value: Any, convert: Callable[[Any, str], T], what: str) -> tuple[T, ...]:
    return tuple(convert(entry, what) for entry in _typed(value, list, what))


def _file(value: Any, name: str) -> FileRecord:
    if not _FILE.fullmatch(name):
        raise FormatError(f"{name!r} is no name of a file of a checkpoint")
    value = _typed(value, dict, f"file {name}")
    sha256 = value.get("sha256")
    if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)):
        raise FormatError(f"the sha256 of file {name} is {sha256!r}")
    return FileRecord(_count(value.get("size"), f"the size of file {name}"), sha256)


def _item(value: Any, files: Mapping[str, FileRecord]) -> Item:
    fields = _typed(value, list, "an item")
    if len(fields) != 8:
        raise FormatError(f"an item has {len(fields)} fields, expected 8")
    name = fields[0]
    if not isinstance(name, str) or name not in files:
        raise FormatError(f"an item is in file {name!r}, which is not listed")
    offset, head, size, tail, block = (_count(field, f"an item in {name}") for field in fields[1:6])
    check_lengths(head, tail, block)
    item = Item(name, offset, head, size, tail, block, *(_typed(field, str, "a checksum") for field in fields[6:]))
    if item.stop > files[name].size:
        raise FormatError(f"an item ends at byte {item.stop} of {name}, which has {files[name].size}")
    where = f"the item at byte {offset} of {name}"
    if len(item.crc32) != 8 * -(-size // block) or not re.fullmatch("[0-9a-f]*", item.crc32):
        raise FormatError(f"{where} has not one checksum for each {block} of its {size} bytes")
    if not re.fullmatch("[0-9a-f]{16}", item.frame):
        raise FormatError(f"{where} has the frame's checksums {item.frame!r}")
    return item


def _tensor(key: str, value: Any, items: tuple[Item, ...]) -> TensorRecord:
    value = _typed(value, dict, f"tensor {key!r}")
    dtype = DTYPES.get(_typed(value.get("dtype"), str, f"the dtype of {key!r}"))
    if dtype is None:
        raise FormatError(f"tensor {key!r} has the dtype {value['dtype']!r}, which this torch does not have")
    saved = SavedTensor(_list_of(value.get("shape"), _count, f"the shape of {key!r}"), dtype)
    chunks = _list_of(value.get("chunks"), lambda chunk, _: _chunk(chunk, key, dtype, items), f"the chunks of {key!r}")
    if not chunks or not tiles([chunk.box for chunk in chunks], saved.shape):
        raise FormatError(f"the chunks of tensor {key!r} do not make up its shape {saved.shape}")
    return TensorRecord(saved, chunks, *_path_and_rank(value, key))


def _chunk(value: Any, key: str, dtype: torch.dtype, items: tuple[Item, ...]) -> Chunk:
    fields = _typed(value, list, f"a chunk of {key!r}")
    if len(fields) != 3:
        raise FormatError(f"a chunk of {key!r} has {len(fields)} fields, expected 3")
    offsets, sizes = (_list_of(field, _count, f"a chunk of {key!r}") for field in fields[:2])
    index = _count(fields[2], f"the item of {key!r}")
    if index >= len(items):
        raise FormatError(f"tensor {key!r} is in item {index} of {len(items)}")
    box = Box(offsets, sizes)
    if box.numel * dtype.itemsize != items[index].size:
        raise FormatError(f"a chunk of {key!r} of sizes {sizes} is in an item of {items[index].size} bytes")
    return Chunk(box, index)


def _check_sharing(tensors: Mapping[str, TensorRecord], items: tuple[Item, ...]) -> None:
    """Checks that only small payloads are shared by tensors, so that few bytes cannot claim a large tensor."""
    used = set()
    for key, tensor in tensors.items():
        for chunk in tensor.chunks:
            if chunk.item in used and (items[chunk.item].size > SHARED or len(tensor.chunks) > 1):
                raise FormatError(f"tensor {key!r} has an item in common with another tensor or chunk")
            used.add(chunk.item)


def check_places(tensors: Iterable[EntryPlace], values: Mapping[str, ValueRecord]) -> None:
    """Raises ``FormatError`` unless, for each rank, all entries make up one nested state.

    Args:
        tensors: the place of each tensor.
    """
    places = {key: (value.path, value.rank) for key, value in values.items()}
    # The keys of a mapping are saved as a tuple, in the mapping's own place.
    keys = {
        places[key] for key, value in values.items() if isinstance(value.encoded, dict) and "#tuple" in value.encoded
    }
    check_paths([*tensors, *places.values()], keys)


def _value(key: str, value: Any) -> ValueRecord:
    if "value" not in _typed(value, dict, f"value {key!r}"):
        raise FormatError(f"entry {key!r} has no value")
    return ValueRecord(value["value"], *_path_and_rank(value, key))


def _path_and_rank(value: Mapping[str, Any], key: str) -> tuple[tuple[str | int, ...], int | None]:
    path = _list_of(value.get("path"), lambda part, what: _typed(part, (str, int), what), f"the path of {key!r}")
    if not 1 <= len(path) <= MAX_PATH:
        raise FormatError(f"entry {key[:100]!r} has a path of {len(path)} names")
    rank = None if value.get("rank") is None else _count(value["rank"], f"the rank of {key!r}")
    expected = ".".join(map(str, path)) if rank is None else key_of_rank(".".join(map(str, path)), rank)
    if expected != key:
        raise FormatError(f"entry {key!r} has the path {list(path)}")
    return path, rank
