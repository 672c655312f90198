"""Makes archives in the format of ``torch.save``, in parts that can be written one after another.

PKWARE's APPNOTE.TXT describes the zip format; torch/serialization.py (``_save``) shows what torch puts into an archive.
The CRC-32 of a payload follows the payload (in a data descriptor, which torch writes, too), so that a payload is read
once while it is written. Sizes from 4 GiB on take the zip64 forms. An archive has only the records that ``torch.load``
asks for, because small tensors consist mostly of records: ``data.pkl``, ``byteorder``, ``version``, ``data/0``, ...
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dist_asgd._torch_private import rebuild_tensor_v2, rebuild_tensor_v3

PAYLOAD_ALIGNMENT = 64  # bytes: torch, too, starts payloads on multiples of it, counted from the archive's start
LONG = 2**32 - 1  # bytes from which on sizes and offsets take the zip64 forms
IN_ZIP64 = 2**32 - 1  # stands in the usual field of a size or offset that is in a zip64 field

# The dtypes with a storage class of their own, all from before torch 2. Later dtypes are saved as untyped bytes and the
# dtype (torch/storage.py, _new_dtypes), because torch makes no new storage classes.
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


@dataclass(frozen=True, slots=True)
class ArchiveRecord:
    """A file in an archive."""

    name: bytes
    offset: int  # bytes from the start of the archive to the local header
    nbytes: int  # of the data
    crc32: int  # of the data
    crc_follows: bool = False  # whether CRC-32 and size follow the data instead of preceding it

    def local_header(self) -> bytes:
        """Returns the bytes before the data. Data whose CRC-32 follows are aligned by torch's kind of extra field."""
        extra = b""
        if self.crc_follows:
            extra = struct.pack("<2H2Q", 1, 16, 0, 0) if self._is_long else b""
            end = self.offset + 30 + len(self.name) + len(extra) + 4
            padding = -end % PAYLOAD_ALIGNMENT
            extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
        crc, size = (0, IN_ZIP64 if self._is_long else 0) if self.crc_follows else (self.crc32, self.nbytes)
        return (
            b"PK\x03\x04" + self._common(crc, size) + struct.pack("<2H", len(self.name), len(extra)) + self.name + extra
        )

    def descriptor(self) -> bytes:
        """Returns the bytes behind data whose CRC-32 follows the data."""
        return b"PK\x07\x08" + struct.pack("<L2Q" if self._is_long else "<3L", self.crc32, self.nbytes, self.nbytes)

    def directory_entry(self) -> bytes:
        """Returns the record's entry in the directory at the end of the archive."""
        sizes = [self.nbytes, self.nbytes] if self._is_long else []
        longs = sizes + ([self.offset] if self.offset >= LONG else [])
        extra = struct.pack(f"<2H{len(longs)}Q", 1, 8 * len(longs), *longs) if longs else b""
        common = self._common(self.crc32, IN_ZIP64 if sizes else self.nbytes)
        rest = struct.pack("<5H2L", len(self.name), len(extra), 0, 0, 0, 0, _shortened(self.offset))
        return b"PK\x01\x02" + struct.pack("<H", 45 if longs else 20) + common + rest + self.name + extra

    @property
    def _is_long(self) -> bool:
        return self.nbytes >= LONG

    def _common(self, crc32: int, size: int) -> bytes:
        version = 45 if self._is_long or self.offset >= LONG else 20
        date = 0x21  # 1 January 1980, the earliest date of zip
        return struct.pack("<5H3L", version, 8 if self.crc_follows else 0, 0, 0, date, crc32, size, size)


def directory(records: Sequence[ArchiveRecord], at: int) -> bytes:
    """Returns the end of an archive: the directory of all records, which starts at byte ``at`` of the archive."""
    entries = b"".join(record.directory_entry() for record in records)
    count, size = len(records), len(entries)
    longer = b""
    if count >= 0xFFFF or max(at, size) >= LONG:
        longer = b"PK\x06\x06" + struct.pack("<Q2H2L4Q", 44, 45, 45, 0, 0, count, count, size, at)
        longer += b"PK\x06\x07" + struct.pack("<LQL", 0, at + size, 1)
    counts = [min(count, 0xFFFF)] * 2
    places = _shortened(size), _shortened(at)
    return entries + longer + b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, *counts, *places, 0)


def _shortened(number: int) -> int:
    """Returns the content of a 32-bit field for a size or offset."""
    return IN_ZIP64 if number >= LONG else number


def beginning(description: bytes) -> tuple[bytes, list[ArchiveRecord]]:
    """Returns the bytes of an archive before the first payload, and the records in them.

    Args:
        description: the record ``data.pkl``, as ``description()`` makes it.
    """
    data, records = b"", []
    for name, content in ((b"data.pkl", description), (b"byteorder", b"little"), (b"version", b"3\n")):
        record = ArchiveRecord(b"archive/" + name, len(data), len(content), zlib.crc32(content))
        records.append(record)
        data += record.local_header() + content
    return data, records


def payload_record(number: int, offset: int, nbytes: int, crc32: int = 0) -> ArchiveRecord:
    """Returns the record of the elements of tensor ``number``, whose local header is at byte ``offset``."""
    return ArchiveRecord(b"archive/data/%d" % number, offset, nbytes, crc32, crc_follows=True)


def payload_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Returns the bytes of the elements of a tensor."""
    return math.prod(shape) * dtype.itemsize


class _Storage:
    """Stands for the storage of a tensor while the tensor is pickled."""

    def __init__(self, number: int, dtype: torch.dtype, nbytes: int) -> None:
        if dtype in STORAGE_CLASSES:
            kind, numel = getattr(torch, STORAGE_CLASSES[dtype]), nbytes // dtype.itemsize
        else:
            kind, numel = torch.UntypedStorage, nbytes
        self.persistent_id = ("storage", kind, str(number), "cpu", numel)


class Stub:
    """Pickles like a contiguous tensor whose elements are the record ``data/<number>``, without holding elements."""

    def __init__(self, number: int, dtype: torch.dtype, shape: Sequence[int]) -> None:
        self.number = number
        self.dtype = dtype
        self.shape = tuple(shape)

    def __reduce__(self) -> tuple[Any, ...]:
        storage = _Storage(self.number, self.dtype, payload_bytes(self.dtype, self.shape))
        strides = tuple([math.prod(max(size, 1) for size in self.shape[n + 1 :]) for n in range(len(self.shape))])
        hooks: OrderedDict[int, Any] = OrderedDict()
        arguments = (storage, 0, self.shape, strides, False, hooks)
        if self.dtype in STORAGE_CLASSES:
            return rebuild_tensor_v2, arguments
        return rebuild_tensor_v3, (*arguments, self.dtype)


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> tuple[Any, ...] | None:
        return value.persistent_id if isinstance(value, _Storage) else None


def description(value: Stub | dict[str, Stub]) -> bytes:
    """Returns the record ``data.pkl``: the pickle of one tensor, or of a dict of tensors."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()
