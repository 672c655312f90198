"""``manifest.json``, the commit record of a checkpoint: what it holds, where each byte lies, and every byte's checksum.

The file format is documented in docs/checkpoint-format.md. Reading trusts nothing: whatever a manifest says is checked
before it is used, and what is wrong is a ``CheckpointError``.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from dist_asgd.boxes import Box, tiles
from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.format.entries import SavedTensor
from dist_asgd.checkpoint.format.manifest_rules import EntryPlace, Wrong, check_lengths, check_overlaps, check_paths

NAME = "manifest.json"
STOCK = ".metadata"  # what torch.distributed.checkpoint reads

FORMAT = "dist_asgd checkpoint"
VERSION = 1  # that we write
READER = 1  # the oldest version of a reader that understands it

NO_FRAME = "0" * 16  # the checksums of a head and a tail of no bytes
MAX_DEPTH = 200  # names in a path
SHARED = 1024  # bytes; smaller payloads are stored once, however many tensors have them
_FILE = re.compile(r"__[0-9]+_[0-9]+\.distcp|\.metadata")
_DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"}\s*\Z')
_ZEROS = b"0" * 64

_DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex128", "complex64", "complex32", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
    if hasattr(torch, name)
}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Item:
    """One block of a tensor in a file: an archive of ``head``, payload and ``tail`` bytes.

    An item that no tensor is in has what is there for ``torch.distributed.checkpoint`` only: values.
    """

    file: str
    offset: int  # in the file, of the head
    head: int  # bytes
    size: int  # bytes of payload
    tail: int  # bytes
    block: int  # bytes of payload that have one checksum, the last one less
    crc32: str  # 8 hex digits for each block: CRC-32 of the payload up to the end of the block
    frame: str  # 16 hex digits: CRC-32 of the head, and of the tail

    @property
    def start(self) -> int:
        """Where the payload begins in the file."""
        return self.offset + self.head

    @property
    def stop(self) -> int:
        """Where the item ends in the file."""
        return self.offset + self.head + self.size + self.tail

    def crc_before(self, block: int) -> int:
        """Of the payload before block number ``block``."""
        return int(self.crc32[8 * block - 8 : 8 * block], 16) if block else 0

    def reach(self, blocks: range) -> tuple[int, int]:
        """``[start, stop)`` in the file: of ``blocks``, with the head before the first, and the tail after the last."""
        start = self.start + blocks.start * self.block if blocks.start else self.offset
        end = blocks.stop * self.block
        return start, self.start + end if end < self.size else self.stop

    def damages(self, blocks: range, data: memoryview) -> Iterator[tuple[int, int]]:
        """``[start, stop)`` in the file of each part of ``data``, the bytes of ``reach``, without its checksum."""
        first, last = self.reach(blocks)
        if first == self.offset and zlib.crc32(data[: self.head]) != int(self.frame[:8], 16):
            yield self.offset, self.start
        for block in blocks:
            start = self.start + block * self.block
            stop = min(start + self.block, self.start + self.size)
            if zlib.crc32(data[start - first : stop - first], self.crc_before(block)) != self.crc_before(block + 1):
                yield start, stop
        end = self.start + self.size
        if last == self.stop and zlib.crc32(data[end - first :]) != int(self.frame[8:], 16):
            yield end, self.stop


@dataclass(frozen=True, slots=True)
class Chunk:
    box: Box
    item: int  # index of Manifest.items


@dataclass(frozen=True, slots=True)
class TensorRecord:
    saved: SavedTensor
    chunks: tuple[Chunk, ...]  # each element of the tensor is in exactly one
    path: tuple[str | int, ...]  # in the nested state
    rank: int | None = None  # that had this value, where ranks had different ones


@dataclass(frozen=True, slots=True)
class ValueRecord:
    encoded: Any  # what values.encode has made of it
    path: tuple[str | int, ...]
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class FileRecord:
    size: int  # bytes
    sha256: str | None = None  # of files that have no items


@dataclass(frozen=True, slots=True)
class Manifest:
    step: int
    world_size: int
    created: float  # seconds since the epoch
    versions: Mapping[str, str]
    files: Mapping[str, FileRecord]
    items: tuple[Item, ...]
    tensors: Mapping[str, TensorRecord]
    values: Mapping[str, ValueRecord]


def in_directory(directory: str, name: str) -> str:
    """The path of a file of the checkpoint in ``directory``; "" where the storage is that of one checkpoint."""
    return "/".join(filter(None, (directory, name)))


def key_of_rank(key: str, rank: int) -> str:
    """Under which an entry stands that each rank has its own of."""
    return f"{key}@rank{rank}"


def write_manifest(manifest: Manifest) -> bytes:
    """The bytes of ``manifest.json``. Its last member is the SHA-256 of the file with zeros in that place."""
    record: dict[str, Any] = {"format": FORMAT, "version": VERSION, "reader": READER}
    record |= {"step": manifest.step, "world_size": manifest.world_size, "created": manifest.created}
    record |= {"versions": dict(manifest.versions)}
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
            **_place(tensor),
        }
        for key, tensor in manifest.tensors.items()
    }
    record["values"] = {key: {"value": value.encoded, **_place(value)} for key, value in manifest.values.items()}
    record["sha256"] = _ZEROS.decode()
    data = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
    return data[: -len(_ZEROS) - 2] + hashlib.sha256(data).hexdigest().encode() + data[-2:]


def _place(record: TensorRecord | ValueRecord) -> dict[str, Any]:
    return {"path": list(record.path)} | ({} if record.rank is None else {"rank": record.rank})


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_manifest(data: bytes) -> Manifest:
    """The manifest in the bytes of ``manifest.json``.

    Raises:
        CheckpointError: it is damaged, contradicts itself, or is of a later version than this library reads.
    """
    found = _DIGEST.search(data)
    if found is None:
        raise CheckpointError(f"{NAME} is not whole: it has no sha256 at its end")
    zeroed = data[: found.start(1)] + _ZEROS + data[found.end(1) :]
    if hashlib.sha256(zeroed).hexdigest().encode() != found[1]:
        raise CheckpointError(f"{NAME} is damaged: its contents do not have the sha256 that stands in it")
    try:
        return _manifest(json.loads(data))
    except Wrong as wrong:
        raise CheckpointError(f"{NAME} is not valid: {wrong}") from None
    except (ValueError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{NAME} is not valid: {error}") from error


def _manifest(record: Any) -> Manifest:
    record = _of(record, dict, "it")
    if record.get("format") != FORMAT:
        raise Wrong(f"its format is {record.get('format')!r}, not {FORMAT!r}")
    reader = _count(record.get("reader"), "reader")
    if reader > VERSION:
        raise Wrong(f"it asks for a reader of version {reader}, and this is version {VERSION}: upgrade dist_asgd")
    files = {_file_name(name): _file(value, name) for name, value in _members(record, "files")}
    items = tuple(_item(value, files) for value in _of(record.get("items"), list, "items"))
    if STOCK not in files or files[STOCK].sha256 is None:
        raise Wrong(f"it has no sha256 of {STOCK}")
    check_overlaps((item.file, item.offset, item.stop) for item in items)
    tensors = {key: _tensor(key, value, items) for key, value in _members(record, "tensors")}
    _check_sharing(tensors, items)
    values = {key: _value(key, value) for key, value in _members(record, "values")}
    places = [(tensor.path, tensor.rank) for tensor in tensors.values()]
    check_paths([*places, *((value.path, value.rank) for value in values.values())], _paths_of_keys(values))
    return Manifest(
        step=_count(record.get("step"), "step"),
        world_size=_count(record.get("world_size"), "world_size"),
        created=_of(record.get("created"), (int, float), "created"),
        versions={name: _of(value, str, f"version of {name}") for name, value in _members(record, "versions")},
        files=files,
        items=items,
        tensors=tensors,
        values=values,
    )


def _members(record: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    return list(_of(record.get(name), dict, name).items())


def _of(value: Any, kind: Any, what: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        expected = kind.__name__ if isinstance(kind, type) else "number"
        raise Wrong(f"{what} is a {type(value).__name__}, expected a {expected}")
    return value


def _count(value: Any, what: str) -> int:
    number: int = _of(value, int, what)
    if not 0 <= number < 2**63:
        raise Wrong(f"{what} is {number}")
    return number


def _list_of(value: Any, convert: Callable[[Any, str], T], what: str) -> tuple[T, ...]:
    return tuple(convert(entry, what) for entry in _of(value, list, what))


def _file_name(name: str) -> str:
    if not _FILE.fullmatch(name):
        raise Wrong(f"{name!r} is no name of a file of a checkpoint")
    return name


def _file(value: Any, name: str) -> FileRecord:
    value = _of(value, dict, f"file {name}")
    sha256 = value.get("sha256")
    if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)):
        raise Wrong(f"the sha256 of file {name} is {sha256!r}")
    return FileRecord(_count(value.get("size"), f"the size of file {name}"), sha256)


def _item(value: Any, files: Mapping[str, FileRecord]) -> Item:
    fields = _of(value, list, "an item")
    if len(fields) != 8:
        raise Wrong(f"an item has {len(fields)} fields, expected 8")
    name = fields[0]
    if not isinstance(name, str) or name not in files:
        raise Wrong(f"an item is in file {name!r}, which is not listed")
    offset, head, size, tail, block = (_count(field, f"an item in {name}") for field in fields[1:6])
    check_lengths(head, tail, block)
    item = Item(name, offset, head, size, tail, block, *(_of(field, str, "a checksum") for field in fields[6:]))
    if item.stop > files[name].size:
        raise Wrong(f"an item ends at byte {item.stop} of {name}, which has {files[name].size}")
    if len(item.crc32) != 8 * -(-size // block) or not re.fullmatch("[0-9a-f]*", item.crc32):
        raise Wrong(f"the item at byte {offset} of {name} has not one checksum for each {block} of its {size} bytes")
    if not re.fullmatch("[0-9a-f]{16}", item.frame):
        raise Wrong(f"the item at byte {offset} of {name} has the frame's checksums {item.frame!r}")
    return item


def _tensor(key: str, value: Any, items: tuple[Item, ...]) -> TensorRecord:
    value = _of(value, dict, f"tensor {key!r}")
    dtype = _DTYPES.get(_of(value.get("dtype"), str, f"the dtype of {key!r}"))
    if dtype is None:
        raise Wrong(f"tensor {key!r} has the dtype {value['dtype']!r}, which this torch does not have")
    saved = SavedTensor(_list_of(value.get("shape"), _count, f"the shape of {key!r}"), dtype)
    chunks = tuple(_chunk(chunk, key, dtype, items) for chunk in _of(value.get("chunks"), list, f"chunks of {key!r}"))
    if not chunks or not tiles([chunk.box for chunk in chunks], saved.shape):
        raise Wrong(f"the chunks of tensor {key!r} do not make up its shape {saved.shape}")
    return TensorRecord(saved, chunks, *_path_and_rank(value, key))


def _chunk(value: Any, key: str, dtype: torch.dtype, items: tuple[Item, ...]) -> Chunk:
    fields = _of(value, list, f"a chunk of {key!r}")
    if len(fields) != 3:
        raise Wrong(f"a chunk of {key!r} has {len(fields)} fields, expected 3")
    offsets, sizes = (_list_of(field, _count, f"a chunk of {key!r}") for field in fields[:2])
    index = _count(fields[2], f"the item of {key!r}")
    if index >= len(items):
        raise Wrong(f"tensor {key!r} is in item {index} of {len(items)}")
    box = Box(offsets, sizes)
    if box.numel * dtype.itemsize != items[index].size:
        raise Wrong(f"a chunk of {key!r} of sizes {sizes} is in an item of {items[index].size} bytes")
    return Chunk(box, index)


def _check_sharing(tensors: Mapping[str, TensorRecord], items: tuple[Item, ...]) -> None:
    """Few bytes must not stand for a large tensor."""
    used = set()
    for key, tensor in tensors.items():
        for chunk in tensor.chunks:
            if chunk.item in used and (items[chunk.item].size > SHARED or len(tensor.chunks) > 1):
                raise Wrong(f"tensor {key!r} has an item in common with another tensor or chunk")
            used.add(chunk.item)


def _paths_of_keys(values: Mapping[str, ValueRecord]) -> set[EntryPlace]:
    """Of the tuples among the values: the keys of a mapping stand where it is, and its parts below."""
    tuples = (value for value in values.values() if isinstance(value.encoded, dict) and "#tuple" in value.encoded)
    return {(value.path, value.rank) for value in tuples}


def _value(key: str, value: Any) -> ValueRecord:
    if "value" not in _of(value, dict, f"value {key!r}"):
        raise Wrong(f"entry {key!r} has no value")
    return ValueRecord(value["value"], *_path_and_rank(value, key))


def _path_and_rank(value: Mapping[str, Any], key: str) -> tuple[tuple[str | int, ...], int | None]:
    path = _list_of(value.get("path"), lambda part, what: _of(part, (str, int), what), f"the path of {key!r}")
    if not 1 <= len(path) <= MAX_DEPTH:
        raise Wrong(f"entry {key[:100]!r} has a path of {len(path)} names")
    rank = None if value.get("rank") is None else _count(value["rank"], f"the rank of {key!r}")
    expected = ".".join(map(str, path)) if rank is None else key_of_rank(".".join(map(str, path)), rank)
    if expected != key:
        raise Wrong(f"entry {key!r} has the path {list(path)}")
    return path, rank
