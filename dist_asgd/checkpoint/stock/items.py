"""Reads the items of ``.distcp`` files that torch wrote, verifies their CRC-32 and trusts nothing that they say.

An item is the zip archive that ``torch.save`` makes of one tensor or of one value ([Note: items] in
`checkpoint/format/dcp_metadata.py`). ``torch.load`` is not used: it neither compares the CRC-32 of what it reads nor
bounds the memory that the description of a tensor asks for.
"""

from __future__ import annotations

import contextlib
import io
import struct
import zipfile
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
_LOCAL_HEADER = 30  # bytes before the name and the extra field, whose lengths are the last two numbers of the header
_LIMIT = 2**20  # bytes that are read at once; no record of a tensor except for its payload has more
CRC_HINT = ": it is damaged (or was saved after torch.serialization.set_crc32_options(False))"
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
    """Returns the tensor that an item holds, on the CPU, in new memory, with the strides that it was saved with.

    The new memory has at most as many bytes as ``data``.

    Args:
        data: all bytes of the item.
        dtype: dtype of the tensor according to the metadata.
        shape: shape of the tensor according to the metadata.

    Raises:
        CheckpointError: a CRC-32 is wrong, dtype or shape differ from the metadata,
            or the item holds no dense tensor that was saved in little endian.
    """
    records = _verified_records(data)
    for name in ("data.pkl", "data/0"):
        if name not in records:
            raise CheckpointError(f"the item has no record {name}: it is no tensor that torch.save wrote")
    found = _description(records["data.pkl"])
    _check_description(found, dtype, tuple(shape), len(records["data/0"]))
    return _tensor(found, _payload(records, "data/0"))


def _payload(records: Mapping[str, bytes], name: str) -> Tensor:
    """Returns a copy of the record ``name`` as a 1-D uint8 tensor."""
    _check_order(records.get("byteorder"))
    data = bytearray(records[name])
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8, device="cpu")


def _tensor(found: _Description, payload: Tensor) -> Tensor:
    """Returns the described tensor as a view of its payload (1-D, uint8)."""
    if 0 in found.shape:
        return torch.empty(found.shape, dtype=found.dtype, device="cpu")
    return payload.view(found.dtype).as_strided(found.shape, found.strides, found.offset)


def _tensor_of(call: Call, records: Mapping[str, bytes], payloads: dict[str, Tensor]) -> Tensor | None:
    """Returns the tensor that a call in a pickled value would make, or None for any other call.

    Tensors that shared a storage share memory again: ``payloads`` holds the payload of each record that was used.
    """
    found = _tensor_description(call)
    if found is None or found.record not in records:
        return None
    _check_size(found, len(records[found.record]))
    if found.record not in payloads:
        payloads[found.record] = _payload(records, found.record)
    return _tensor(found, payloads[found.record])


def item_object(data: bytes, trust: bool = False) -> Any:
    """Returns the value that an item holds: anything that was saved but is no tensor.

    Args:
        data: all bytes of the item.
        trust: unpickles the value, which can run any code. Without it the value must be plain data, as
            `checkpoint/stock/plain_values.py` reads it, and nothing is run.

    Raises:
        CheckpointError: a CRC-32 is wrong, the value is not plain data, or unpickling failed.
    """
    records = _verified_records(data)
    if "data.pkl" not in records:
        raise CheckpointError("the item has no record data.pkl: it is no value that torch.save wrote")
    if not trust:
        payloads: dict[str, Tensor] = {}
        return plain_value(records["data.pkl"], lambda call: _tensor_of(call, records, payloads), _ALLOWED)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
    except Exception as error:  # code that is run by unpickling may raise anything
        raise CheckpointError(f"the value cannot be unpickled ({type(error).__name__}: {error})") from error


@dataclass(frozen=True, slots=True)
class Layout:
    """Place and order of a tensor's elements in its item. The payload is the part of the item that has the elements."""

    start: int  # first byte of the payload, counted from the beginning of the item
    nbytes: int  # length of the payload in bytes
    crc32: int  # CRC-32 of the payload according to the item
    strides: tuple[int, ...]  # in elements
    offset: int  # index of the tensor's first element in the payload, in elements


def item_layout(file: BinaryIO, length: int, expected: SavedTensor) -> Layout:
    """Returns where the elements of a tensor lie in an item that is too large to be read at once.

    Reads and verifies everything in the item except for the payload, whose CRC-32 the caller has to compare.

    Args:
        file: seekable file that has exactly the bytes of the item.
        length: length of the item in bytes.
        expected: shape and dtype of the tensor according to the metadata.

    Raises:
        CheckpointError: a CRC-32 is wrong, dtype or shape differ from ``expected``,
            or the item holds no dense tensor that was saved in little endian.
        StorageError: ``file`` could not be read.
    """
    with _archive(file) as archive:
        return _layout(archive, file, length, expected)


def check_item(file: BinaryIO, length: int, expected: SavedTensor | None) -> None:
    """Validates the CRC-32 of everything in an item, and a tensor's description. Takes bounded memory for any item.

    Args:
        file: seekable file that has exactly the bytes of the item.
        length: length of the item in bytes.
        expected: shape and dtype of the tensor according to the metadata; None where the item holds a value.

    Raises:
        CheckpointError: a CRC-32 is wrong, dtype or shape differ from ``expected``,
            or the item holds no dense tensor that was saved in little endian.
        StorageError: ``file`` could not be read.
    """
    with _archive(file) as archive:
        for entry in _entries(archive, length).values():
            with archive.open(entry) as record:
                while record.read(_LIMIT):
                    pass
        if expected is not None:
            _layout(archive, file, length, expected)


def _layout(archive: zipfile.ZipFile, file: BinaryIO, length: int, expected: SavedTensor) -> Layout:
    entries = _entries(archive, length)
    payload = entries.pop("data/0", None)
    if payload is None or "data.pkl" not in entries or any(entry.file_size > _LIMIT for entry in entries.values()):
        raise CheckpointError("the item is no tensor that torch.save wrote")
    records = {name: archive.read(entry) for name, entry in entries.items()}
    _check_order(records.get("byteorder"))
    found = _description(records["data.pkl"])
    _check_description(found, expected.dtype, expected.shape, payload.file_size)
    file.seek(payload.header_offset)
    start = _start_of_data(payload, file.read(_LOCAL_HEADER), length)
    return Layout(start, payload.file_size, payload.CRC, found.strides, found.offset)


@contextlib.contextmanager
def _archive(file: BinaryIO) -> Iterator[zipfile.ZipFile]:
    """Opens the zip archive in ``file``. Turns errors of the archive into CheckpointError, but not StorageError."""
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    except (StorageError, CheckpointError):
        raise
    except _NO_ARCHIVE as error:
        if "CRC" in str(error):
            raise CheckpointError(f"{error}{CRC_HINT}") from error
        raise CheckpointError(f"the item is no zip archive, as torch.save makes them ({error})") from error


def _check_order(record: bytes | None) -> None:
    if record not in (None, b"little"):
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
    """Description of a dense tensor in a pickle that ``torch.save`` wrote."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    offset: int  # index of the tensor's first element in the payload, in elements
    record: str  # name of the archive's record that has the payload


def _description(data: bytes) -> _Description:
    """Reads ``data.pkl`` of an item that holds one dense tensor."""
    found = read_pickle(data, _ALLOWED, persistent=True)
    described = _tensor_description(found)
    if described is None:
        raise CheckpointError(f"the item is {short(found)}, expected a plain dense tensor without conj or neg bit")
    if described.record != "data/0":
        raise CheckpointError("the elements of the item are not where torch.save stores them")
    return described


def _tensor_description(found: Any) -> _Description | None:
    """Returns the description of a dense tensor, as ``Tensor.__reduce_ex__`` makes it, or None for any other data."""
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
    """Returns the name of a storage's class, and the name of the record that has the storage's bytes."""
    match storage:
        case Call(name=pickle_reader.PERSISTENT, arguments=(("storage", Global(name), str(number), str(), int()),)):
            return name, f"data/{number}"
    raise CheckpointError("the elements of the item are not where torch.save stores them")


def _verified_records(data: bytes) -> dict[str, bytes]:
    """Returns the bytes of each record of an item by its name, after a comparison with its CRC-32.

    The names are without the first folder, which is the name that ``torch.save`` gave to the archive.
    """
    with _archive(io.BytesIO(data)) as archive:
        return {name: archive.read(entry) for name, entry in _entries(archive, len(data)).items()}


def _entries(archive: zipfile.ZipFile, length: int) -> dict[str, zipfile.ZipInfo]:
    """Returns the directory of an item of ``length`` bytes by the records' names, which are without the first folder.

    All records are uncompressed and disjoint.
    """
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        length -= entry.file_size  # entries may point at the same bytes; those of torch.save do not
        if length < 0:
            raise CheckpointError("the records of the item overlap: it is damaged, or made to do harm")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise CheckpointError(f"{short(entry.filename)} in the item is compressed, which torch.save never does")
        name = entry.filename.partition("/")[2]
        if entries.setdefault(name, entry) is not entry:
            raise CheckpointError(f"{short(entry.filename)} is in the item twice")
    return entries


def _start_of_data(entry: zipfile.ZipInfo, header: bytes, length: int) -> int:
    """Returns the first byte of a record's data in an item of ``length`` bytes, given its local header's first 30."""
    at = entry.header_offset
    if len(header) < _LOCAL_HEADER or not header.startswith(b"PK\x03\x04"):
        raise CheckpointError(f"the item has no record at byte {at}, where its directory says so")
    start = at + _LOCAL_HEADER + sum(struct.unpack("<2H", header[26:]))
    if start + entry.file_size > length:
        raise CheckpointError(f"the item ends at {length} bytes, before its record at byte {at} ends: it is cut off")
    return start
