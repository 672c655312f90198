"""Items of stock ``.distcp`` files, verified and read without trusting them. See [Note: items] in dcp_metadata.py.

``torch.load`` neither looks at the CRC-32 of what it reads nor bounds the memory that a description asks for.
"""

from __future__ import annotations

import contextlib
import io
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.format.entries import SavedTensor
from dist_asgd.checkpoint.format.torch_archive import STORAGE_CLASSES
from dist_asgd.checkpoint.stock import pickle_reader
from dist_asgd.checkpoint.stock.pickle_reader import DTYPE_GLOBALS, DTYPES, Call, Global, read_pickle, short
from dist_asgd.checkpoint.stock.plain_values import plain_value
from dist_asgd.checkpoint.storage.retry import StorageError

_DTYPES_OF_CLASSES = {f"torch.{name}": dtype for dtype, name in STORAGE_CLASSES.items()}
_LOCAL_HEADER = 30  # bytes, before the name and the extra field, whose lengths are its last two numbers
_CHUNK = 2**20  # bytes that are read at once, and more than the description of a tensor has
NO_CRCS = ": it is damaged (or was saved after torch.serialization.set_crc32_options(False))"
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
    found = _description(bytes(records["data.pkl"]))
    _check_description(found, dtype, tuple(shape), len(records["data/0"]))
    return _tensor(found, _payload(records, "data/0"))


def _payload(records: Mapping[str, memoryview], name: str) -> Tensor:
    """In memory of its own."""
    _check_order(records.get("byteorder"))
    data = bytearray(records[name])
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8, device="cpu")


def _tensor(found: _Description, payload: Tensor) -> Tensor:
    """In the payload's memory."""
    if 0 in found.shape:
        return torch.empty(found.shape, dtype=found.dtype, device="cpu")
    return payload.view(found.dtype).as_strided(found.shape, found.strides, found.offset)


def _tensor_in(node: Call, records: Mapping[str, memoryview], payloads: dict[str, Tensor]) -> Tensor | None:
    """The tensor that a node in a value describes; None if it describes none. Several may lie in one payload."""
    found = _described(node)
    if found is None or found.record not in records:
        return None
    _check_size(found, len(records[found.record]))
    if found.record not in payloads:
        payloads[found.record] = _payload(records, found.record)
    return _tensor(found, payloads[found.record])


def item_object(data: bytes, trust: bool = False) -> Any:
    """The value in an item that is no tensor.

    Args:
        data: the whole item.
        trust: unpickle it, which can run any code; otherwise it must be plain data (plain_values.py), and nothing is run.

    Raises CheckpointError when a CRC-32 is wrong, or when the value cannot be read.
    """
    records = _verified_records(data)
    if "data.pkl" not in records:
        raise CheckpointError("the item has no record data.pkl: it is no value that torch.save wrote")
    if not trust:
        payloads: dict[str, Tensor] = {}
        return plain_value(bytes(records["data.pkl"]), lambda node: _tensor_in(node, records, payloads), _ALLOWED)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
    except Exception as error:  # any: what is unpickled may raise anything
        raise CheckpointError(f"the value cannot be unpickled ({type(error).__name__}: {error})") from error


@dataclass(frozen=True, slots=True)
class Layout:
    """How the elements of a tensor lie in its item."""

    start: int  # of the payload, in bytes from the beginning of the item
    nbytes: int  # of the payload
    crc32: int  # of the payload
    strides: tuple[int, ...]
    offset: int  # of the first element in the payload, in elements


def item_layout(file: BinaryIO, length: int, expected: SavedTensor) -> Layout:
    """Of an item that is too large to be read at once. Everything but the payload is verified.

    Args:
        file: has the item's ``length`` bytes.
        expected: what the metadata says of the tensor.

    Raises CheckpointError as ``item_tensor`` does.
    """
    with _archive(file) as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in _entries(archive, length)}
        payload = entries.pop("data/0", None)
        if payload is None or "data.pkl" not in entries or any(entry.file_size > _CHUNK for entry in entries.values()):
            raise CheckpointError("the item is no tensor that torch.save wrote")
        records = {name: archive.read(entry) for name, entry in entries.items()}
        _check_order(records.get("byteorder"))
        found = _description(records["data.pkl"])
        _check_description(found, expected.dtype, expected.shape, payload.file_size)
        file.seek(payload.header_offset)
        start = payload.header_offset + _header_size(file.read(_LOCAL_HEADER), payload.header_offset)
        if start + payload.file_size > length:
            raise CheckpointError(f"the item ends at {length} bytes, before its elements: it is cut off")
        return Layout(start, payload.file_size, payload.CRC, found.strides, found.offset)


def check_item(file: BinaryIO, length: int, expected: SavedTensor | None) -> None:
    """Reads all of an item, of any size, in bounded memory.

    Args:
        file: has the item's ``length`` bytes.
        expected: what the metadata says of a tensor; None where the item is a value.

    Raises CheckpointError as ``item_tensor`` does.
    """
    with _archive(file) as archive:
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


@contextlib.contextmanager
def _archive(file: BinaryIO) -> Iterator[zipfile.ZipFile]:
    """The archive in ``file``. Its errors are ``CheckpointError``; those of the storage stay as they are."""
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    except (StorageError, CheckpointError):
        raise
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{error}{NO_CRCS if 'CRC' in str(error) else ''}") from error
    except _NO_ARCHIVE as error:
        raise CheckpointError(f"the item is no zip archive, as torch.save makes them ({error})") from error


def _check_order(record: bytes | memoryview | None) -> None:
    if record is not None and bytes(record) != b"little":
        raise CheckpointError(
            "the item was saved on a big-endian machine: load and save it by torch on a little-endian"
        )


def _check_description(found: _Description, dtype: torch.dtype, shape: tuple[int, ...], nbytes: int) -> None:
    if found.dtype != dtype or found.shape != shape:
        raise CheckpointError(
            f"the item is a tensor of shape {found.shape} and {found.dtype}, but the metadata says {shape} and {dtype}"
        )
    _check_size(found, nbytes)


def _check_size(found: _Description, nbytes: int) -> None:
    dtype = found.dtype
    last = found.offset + sum((size - 1) * stride for size, stride in zip(found.shape, found.strides, strict=True))
    if 0 not in found.shape and (nbytes % dtype.itemsize or (last + 1) * dtype.itemsize > nbytes):
        raise CheckpointError(f"the item has {nbytes} bytes of elements, {(last + 1) * dtype.itemsize} are needed")


@dataclass(frozen=True, slots=True)
class _Description:
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int  # of the first element in the payload, in elements
    record: str  # of the archive, that has the payload


def _description(data: bytes) -> _Description:
    """What ``data.pkl`` says, where it is what ``torch.save`` makes of a dense tensor (``Tensor.__reduce_ex__``)."""
    found = read_pickle(data, _ALLOWED, persistent=True)
    described = _described(found)
    if described is None:
        raise CheckpointError(f"the item is {short(found)}, expected a plain dense tensor without conj or neg bit")
    if described.record != "data/0":
        raise CheckpointError("the elements of the item are not where torch.save stores them")
    return described


def _described(found: Any) -> _Description | None:
    """The tensor that a node describes; None if it describes none."""
    match found:
        case Call(
            name="torch._utils._rebuild_tensor_v2",
            arguments=(Call() as storage, int(offset), tuple(shape), tuple(strides), bool(), dict()),
        ):
            kind, record = _storage(storage)
            dtype = _DTYPES_OF_CLASSES.get(kind)
        case Call(
            name="torch._utils._rebuild_tensor_v3",
            arguments=(Call() as storage, int(offset), tuple(shape), tuple(strides), bool(), dict(), Global(name)),
        ):
            kind, record = _storage(storage)
            dtype = DTYPES.get(name) if kind == _UNTYPED else None
        case _:
            return None
    numbers = (offset, *shape, *strides)
    if dtype is None or len(shape) != len(strides) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise CheckpointError("the item does not describe a tensor as torch.save does")
    return _Description(dtype, shape, strides, offset, record)


def _storage(storage: Call) -> tuple[str, str]:
    """The class of a storage, and the record that has its bytes."""
    match storage:
        case Call(name=pickle_reader.PERSISTENT, arguments=(("storage", Global(name), str(number), str(), int()),)):
            return name, f"data/{number}"
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
                f"{short(entry.filename)} in the item does not have the CRC-32 that was saved with it{NO_CRCS}"
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
    start = offset + _header_size(data[offset : offset + _LOCAL_HEADER], offset)
    if start + length > len(data):
        raise CheckpointError(f"the item ends at {len(data)} bytes, before its record at byte {offset}: it is cut off")
    return memoryview(data)[start : start + length]


def _header_size(header: bytes, offset: int) -> int:
    """Of the local header at ``offset``, of which ``header`` is the beginning."""
    if len(header) < _LOCAL_HEADER or not header.startswith(b"PK\x03\x04"):
        raise CheckpointError(f"the item has no record at byte {offset}, where its directory says so")
    return _LOCAL_HEADER + sum(struct.unpack("<2H", header[26:]))
