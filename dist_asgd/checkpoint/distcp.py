"""Items and metadata as ``torch.distributed.checkpoint`` (DCP) stores them, written without a copy of the payload.

[Note: items]
A ``.distcp`` file is a sequence of items, and an item of a tensor is what ``torch.save`` makes of it: a zip archive
with the pickled description of the tensor and, stored uncompressed, its elements (torch/serialization.py, ``_save``).
Here an item is three parts:

- *head*: all before the elements. It depends on dtype and shape only.
- *payload*: the elements, row-major, little endian, as they lie in the memory of a contiguous tensor.
- *tail*: the CRC-32 of the payload behind it (the zip format's data descriptor, which torch writes too) and the zip
  directory. So a payload is read once, on its way out of memory.

The zip format is described in PKWARE's APPNOTE.TXT. An archive has the records that ``torch.load`` asks for and no
others, since small tensors consist mostly of them: ``data.pkl``, ``byteorder``, ``version`` and ``data/0``.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import sys
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dist_asgd.checkpoint.entries import CheckpointError
from dist_asgd.layout import Box

MAX_PAYLOAD = 2**30  # bytes of one item: far below the 4 GiB from which an archive needs the zip64 format
ALIGNMENT = 64  # bytes: payloads start on multiples of it, counted from the start of their item, as torch's do

# dtypes that have had a storage class of their own since before torch 2. All later ones are saved as untyped bytes
# and the dtype (torch/storage.py, _new_dtypes), and torch promises to make no new classes.
STORAGE_CLASSES = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.complex128: "ComplexDoubleStorage",
    torch.complex64: "ComplexFloatStorage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.int16: "ShortStorage",
    torch.int8: "CharStorage",
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
}
QUANTIZED = (torch.qint8, torch.qint32, torch.quint8, torch.quint4x2, torch.quint2x4)


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """Where a box of a tensor is stored."""

    box: Box
    path: str  # of the file, relative to the checkpoint's directory, with "/"
    offset: int  # of the item in the file, in bytes
    length: int  # of the item with head and tail, in bytes


@dataclass(frozen=True, slots=True)
class StoredObject:
    """Where a value is stored."""

    path: str
    offset: int
    length: int


def item_head(dtype: torch.dtype, shape: Sequence[int]) -> bytes:
    """All that stands before the payload of a contiguous tensor; its length is a multiple of 64.

    Raises CheckpointError for a payload of more than 1 GiB (cut such a tensor into several boxes) and for quantized
    dtypes, whose tensors are more than their elements.
    """
    return _head(dtype, tuple(shape))[0]


def item_tail(dtype: torch.dtype, shape: Sequence[int], crc32: int) -> bytes:
    """All that stands behind a payload whose CRC-32 (``zlib.crc32``) is ``crc32``."""
    head, records = _head(dtype, tuple(shape))
    nbytes = payload_bytes(dtype, shape)
    payload = records[-1]
    descriptor = b"PK\x07\x08" + struct.pack("<3L", crc32, nbytes, nbytes)
    records = (*records[:-1], _Record(payload.name, payload.offset, crc32, nbytes, payload.flags))
    directory = b"".join(record.directory_entry() for record in records)
    at = len(head) + nbytes + len(descriptor)
    end = b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, len(records), len(records), len(directory), at, 0)
    return descriptor + directory + end


def payload_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """The length of a payload."""
    return math.prod(shape) * dtype.itemsize


def object_item(value: Any) -> bytes:
    """The item of a value that is not a tensor: numbers, strings, None, and lists and dicts of them."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def stock_metadata(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int], Sequence[StoredChunk]]],
    objects: Mapping[str, StoredObject],
    paths: Mapping[str, tuple[str | int, ...]],
) -> bytes:
    """The file ``.metadata``, from which stock ``dcp.load`` learns what is where.

    ``tensors`` gives each key's dtype, whole shape and chunks, which cover it without overlapping; ``paths`` gives the
    way to each key through the nested state dict, as ``flatten_state_dict`` does. Chunks of several keys may lie at
    the same place. Equal arguments in equal order give equal bytes.
    """
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, (dtype, shape, chunks) in tensors.items():
        key = sys.intern(name)
        described = []
        for index, chunk in enumerate(chunks):
            offsets = torch.Size(chunk.box.offsets)
            described.append(ChunkStorageMetadata(offsets=offsets, sizes=torch.Size(chunk.box.sizes)))
            places[MetadataIndex(key, offsets, index)] = _place(chunk)
        entries[key] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), described)
    for name, stored in objects.items():
        key = sys.intern(name)
        entries[key] = BytesStorageMetadata()
        places[MetadataIndex(key)] = _place(stored)
    # Strings are interned since pickle writes a string again, or refers to it, by its identity.
    ways = {
        sys.intern(key): tuple([sys.intern(part) if isinstance(part, str) else part for part in path])
        for key, path in paths.items()
    }
    metadata = Metadata(state_dict_metadata=entries, planner_data=ways, storage_data=places)
    metadata.version = sys.intern("1.0.0")  # by assignment, as torch does: not a field in all releases
    return pickle.dumps(metadata, protocol=4)


def _place(stored: StoredChunk | StoredObject) -> _StorageInfo:
    return _StorageInfo(sys.intern(stored.path), stored.offset, stored.length)


@dataclass(frozen=True, slots=True)
class _Record:
    """A file in the zip archive."""

    name: bytes
    offset: int  # of the local header, from the start of the item
    crc32: int
    nbytes: int
    flags: int  # bit 3: the CRC-32 and the size stand behind the data

    def local_header(self, padding: int = 0) -> bytes:
        """``padding`` bytes, 0 or at least 4, are an extra field, marked as torch marks it."""
        extra = b"FB" + struct.pack("<H", padding - 4) + b"Z" * (padding - 4) if padding else b""
        return b"PK\x03\x04" + self._common() + struct.pack("<2H", len(self.name), padding) + self.name + extra

    def directory_entry(self) -> bytes:
        made_by = struct.pack("<H", 20)
        rest = struct.pack("<5H2L", len(self.name), 0, 0, 0, 0, 0, self.offset)
        return b"PK\x01\x02" + made_by + self._common() + rest + self.name

    def _common(self) -> bytes:
        date = 0x21  # 1 January 1980, the first that zip can say
        return struct.pack("<5H3L", 20, self.flags, 0, 0, date, self.crc32, self.nbytes, self.nbytes)


@lru_cache(maxsize=1024)
def _head(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[bytes, tuple[_Record, ...]]:
    """The head, and the records of the archive; the last one is the payload's, without its CRC-32 and size."""
    if dtype in QUANTIZED:
        raise CheckpointError(
            f"tensors of {dtype} cannot be saved; save their int_repr(), scale and zero point instead"
        )
    nbytes = payload_bytes(dtype, shape)
    if nbytes > MAX_PAYLOAD:
        raise CheckpointError(
            f"an item of shape {shape} and {dtype} has {nbytes} bytes, more than {MAX_PAYLOAD}: "
            "store the tensor as several smaller boxes"
        )
    head = b""
    records = []
    for name, data in ((b"data.pkl", _description(dtype, shape)), (b"byteorder", b"little"), (b"version", b"3\n")):
        record = _Record(b"archive/" + name, len(head), zlib.crc32(data), len(data), 0)
        records.append(record)
        head += record.local_header() + data
    payload = _Record(b"archive/data/0", len(head), 0, 0, 8)
    padding = 4 + -(len(head) + len(payload.local_header()) + 4) % ALIGNMENT
    return head + payload.local_header(padding), (*records, payload)


class _Storage:
    """Stands for the storage of the tensor while the tensor is pickled."""

    def __init__(self, dtype: torch.dtype, nbytes: int) -> None:
        if dtype in STORAGE_CLASSES:
            kind, numel = getattr(torch, STORAGE_CLASSES[dtype]), nbytes // dtype.itemsize
        else:
            kind, numel = torch.UntypedStorage, nbytes
        self.persistent_id = ("storage", kind, "0", "cpu", numel)


class _Tensor:
    """Pickled as a contiguous tensor is, but has no elements."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.dtype = dtype
        self.shape = shape

    def __reduce__(self) -> tuple[Any, ...]:
        storage = _Storage(self.dtype, payload_bytes(self.dtype, self.shape))
        strides = tuple([math.prod(max(size, 1) for size in self.shape[n + 1 :]) for n in range(len(self.shape))])
        hooks: OrderedDict[int, Any] = OrderedDict()
        arguments = (storage, 0, self.shape, strides, False, hooks)
        if self.dtype in STORAGE_CLASSES:
            return torch._utils._rebuild_tensor_v2, arguments
        return torch._utils._rebuild_tensor_v3, (*arguments, self.dtype)


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> tuple[Any, ...] | None:
        return value.persistent_id if isinstance(value, _Storage) else None


def _description(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(_Tensor(dtype, shape))
    return buffer.getvalue()
