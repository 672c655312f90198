"""Items of stock ``.distcp`` files, verified and read without trusting them. See [Note: items] in distcp.py.

``torch.load`` neither looks at the CRC-32 of what it reads nor bounds the memory that a description asks for.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dist_asgd.checkpoint import pickles
from dist_asgd.checkpoint.archives import STORAGE_CLASSES
from dist_asgd.checkpoint.entries import CheckpointError, SavedTensor
from dist_asgd.checkpoint.pickles import DTYPE_GLOBALS, DTYPES, Global, Node, read_pickle, short
from dist_asgd.checkpoint.retries import StorageError

_DTYPES_OF_CLASSES = {f"torch.{name}": dtype for dtype, name in STORAGE_CLASSES.items()}
_LOCAL_HEADER = 30  # bytes, before the name and the extra field, whose lengths are its last two numbers
_CHUNK = 2**20  # bytes that are read at once, and more than the description of a tensor has
_NO_CRCS = ": it is damaged (or was saved after torch.serialization.set_crc32_options(False))"
_NO_ARCHIVE = (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, struct.error, EOFError, OSError)
_UNTYPED = "torch.storage.UntypedStorage"
_ALLOWED = DTYPE_GLOBALS | {
    *(("torch", name) for name in STORAGE_CLASSES.values()),
    ("torch.storage", "UntypedStorage"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("collections", "OrderedDict"),
}


def item_tensor(data: bytes, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """The tensor in an item, in memory of its own, with the strides it was saved with.

    Args:
        data: the whole item.
        dtype, shape: what the metadata says of it.

    Raises CheckpointError when a CRC-32 is wrong, when it is another tensor than the metadata says, or none of
    plain dense elements. Takes no more memory than ``data`` has.
    """
    records = _verified_records(data)
    for name in ("data.pkl", "data/0"):
        if name not in records:
            raise CheckpointError(f"the item has no record {name}: it is no tensor that torch.save wrote")
    if bytes(records.get("byteorder", b"little")) != b"little":
        raise CheckpointError(
            "the item was saved on a big-endian machine: load and save it by torch on a little-endian"
        )
    payload = records["data/0"]
    found = _description(bytes(records["data.pkl"]))
    _check_description(found, dtype, tuple(shape), len(payload))
    if 0 in found.shape:
        return torch.empty(found.shape, dtype=dtype)
    elements = torch.frombuffer(bytearray(payload), dtype=torch.uint8).view(dtype)
    return elements.as_strided(found.shape, found.strides, found.offset)


def item_object(data: bytes, trust: bool = False) -> Any:
    """The value in an item that is no tensor.

    Args:
        data: the whole item.
        trust: unpickle anything in it, which can run any code; otherwise only what ``torch.load(weights_only=True)``
            takes for harmless.

    Raises CheckpointError when a CRC-32 is wrong, or when the value cannot be read.
    """
    _verified_records(data)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=not trust)
    except Exception as error:  # any: it interprets what may be damaged or made to do harm
        raise CheckpointError(
            f"the value cannot be read ({error})"
            + ("" if trust else ": if you trust where it comes from, pass trust=True")
        ) from error


def check_item(file: BinaryIO, length: int, expected: SavedTensor | None) -> None:
    """Reads all of an item, of any size, in bounded memory.

    Args:
        file: has the item's ``length`` bytes.
        expected: what the metadata says of a tensor; None where the item is a value.

    Raises CheckpointError as ``item_tensor`` does.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            sizes = {}
            for entry in _entries(archive, length):
                with archive.open(entry) as record:
                    while record.read(_CHUNK):
                        pass
                sizes[entry.filename.partition("/")[2]] = entry.file_size
            if expected is not None:
                if sizes.get("data.pkl", _CHUNK) >= _CHUNK or "data/0" not in sizes:
                    raise CheckpointError("the item is no tensor that torch.save wrote")
                pickled = next(entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
                found = _description(archive.read(pickled))
                _check_description(found, expected.dtype, expected.shape, sizes["data/0"])
    except (StorageError, CheckpointError):
        raise
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{error}{_NO_CRCS if 'CRC' in str(error) else ''}") from error
    except _NO_ARCHIVE as error:
        raise CheckpointError(f"the item is no zip archive, as torch.save makes them ({error})") from error


def _check_description(found: _Description, dtype: torch.dtype, shape: tuple[int, ...], nbytes: int) -> None:
    if found.dtype != dtype or found.shape != shape:
        raise CheckpointError(
            f"the item is a tensor of shape {found.shape} and {found.dtype}, but the metadata says {shape} and {dtype}"
        )
    last = found.offset + sum((size - 1) * stride for size, stride in zip(found.shape, found.strides, strict=True))
    if 0 not in shape and (nbytes % dtype.itemsize or (last + 1) * dtype.itemsize > nbytes):
        raise CheckpointError(f"the item has {nbytes} bytes of elements, {(last + 1) * dtype.itemsize} are needed")


@dataclass(frozen=True, slots=True)
class _Description:
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int  # of the first element in the payload, in elements


def _description(data: bytes) -> _Description:
    """What ``data.pkl`` says, where it is what ``torch.save`` makes of a dense tensor (``Tensor.__reduce_ex__``)."""
    match read_pickle(data, _ALLOWED, persistent=True):
        case Node(
            name="torch._utils._rebuild_tensor_v2",
            arguments=(Node() as storage, int(offset), tuple(shape), tuple(strides), bool(), dict()),
        ):
            dtype = _DTYPES_OF_CLASSES.get(_storage_class(storage))
        case Node(
            name="torch._utils._rebuild_tensor_v3",
            arguments=(Node() as storage, int(offset), tuple(shape), tuple(strides), bool(), dict(), Global(name)),
        ):
            dtype = DTYPES.get(name) if _storage_class(storage) == _UNTYPED else None
        case other:
            raise CheckpointError(f"the item is {short(other)}, expected a plain dense tensor without conj or neg bit")
    numbers = (offset, *shape, *strides)
    if dtype is None or len(shape) != len(strides) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise CheckpointError("the item does not describe a tensor as torch.save does")
    return _Description(dtype, shape, strides, offset)


def _storage_class(storage: Node) -> str:
    match storage:
        case Node(name=pickles.PERSISTENT, arguments=(("storage", Global(name), "0", str(), int()),)):
            return name
    raise CheckpointError("the elements of the item are not where torch.save stores them")


def _verified_records(data: bytes) -> dict[str, memoryview]:
    """The records of an item, by name without the archive's own; each has the CRC-32 that the zip directory says."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = _entries(archive, len(data))
    except _NO_ARCHIVE as error:
        raise CheckpointError(f"the item is no zip archive, as torch.save makes them ({error})") from error
    records: dict[str, memoryview] = {}
    for entry in entries:
        record = _record(data, entry.header_offset, entry.file_size)
        if zlib.crc32(record) != entry.CRC:
            raise CheckpointError(
                f"{short(entry.filename)} in the item does not have the CRC-32 that was saved with it{_NO_CRCS}"
            )
        records[entry.filename.partition("/")[2]] = record
    return records


def _entries(archive: zipfile.ZipFile, left: int) -> list[zipfile.ZipInfo]:
    """What the directory of an item of ``left`` bytes lists."""
    names = set()
    for entry in archive.infolist():
        left -= entry.file_size  # entries may point at the same bytes; torch.save's do not
        if left < 0:
            raise CheckpointError("the records of the item overlap: it is damaged, or made to do harm")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise CheckpointError(f"{short(entry.filename)} in the item is compressed, which torch.save never does")
        name = entry.filename.partition("/")[2]
        if name in names:
            raise CheckpointError(f"{short(entry.filename)} is in the item twice")
        names.add(name)
    return archive.infolist()


def _record(data: bytes, offset: int, length: int) -> memoryview:
    """The data behind the local header at ``offset``."""
    header = data[offset : offset + _LOCAL_HEADER]
    if len(header) < _LOCAL_HEADER or not header.startswith(b"PK\x03\x04"):
        raise CheckpointError(f"the item has no record at byte {offset}, where its directory says so")
    start = offset + _LOCAL_HEADER + sum(struct.unpack("<2H", header[26:]))
    if start + length > len(data):
        raise CheckpointError(f"the item ends at {len(data)} bytes, before its record at byte {offset}: it is cut off")
    return memoryview(data)[start : start + length]
