"""Archives as ``torch.save`` makes them of tensors, in parts that can be written one after another.

The zip format is described in PKWARE's APPNOTE.TXT, what torch puts into it in torch/serialization.py (``_save``). The
CRC-32 of a payload stands behind it (a data descriptor, which torch writes too), so a payload is read once, on its way
out. Sizes from 4 GiB on take the zip64 forms. An archive has the records that ``torch.load`` asks for and no others,
since small tensors consist mostly of them: ``data.pkl``, ``byteorder``, ``version`` and ``data/0``, ``data/1``, ...
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

ALIGNMENT = 64  # bytes: payloads start on multiples of it, counted from the start of the archive, as torch's do
LONG = 2**32 - 1  # from here on, sizes and offsets take the zip64 forms,
ELSEWHERE = 2**32 - 1  # which have this in their usual place

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


@dataclass(frozen=True, slots=True)
class ArchiveRecord:
    """A file in the archive."""

    name: bytes
    offset: int  # of the local header, from the start of the archive
    nbytes: int
    crc32: int
    crc_follows: bool = False  # CRC-32 and size stand behind the data, and not before it

    def local_header(self) -> bytes:
        """What stands before the data; an extra field, marked as torch marks it, aligns data whose CRC-32 follows."""
        extra = b""
        if self.crc_follows:
            extra = struct.pack("<2H2Q", 1, 16, 0, 0) if self._is_long else b""
            end = self.offset + 30 + len(self.name) + len(extra) + 4
            padding = -end % ALIGNMENT
            extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
        crc, size = (0, ELSEWHERE if self._is_long else 0) if self.crc_follows else (self.crc32, self.nbytes)
        return (
            b"PK\x03\x04" + self._common(crc, size) + struct.pack("<2H", len(self.name), len(extra)) + self.name + extra
        )

    def descriptor(self) -> bytes:
        """What stands behind data whose CRC-32 follows."""
        return b"PK\x07\x08" + struct.pack("<L2Q" if self._is_long else "<3L", self.crc32, self.nbytes, self.nbytes)

    def directory_entry(self) -> bytes:
        sizes = [self.nbytes, self.nbytes] if self._is_long else []
        longs = sizes + ([self.offset] if self.offset >= LONG else [])
        extra = struct.pack(f"<2H{len(longs)}Q", 1, 8 * len(longs), *longs) if longs else b""
        common = self._common(self.crc32, ELSEWHERE if sizes else self.nbytes)
        rest = struct.pack("<5H2L", len(self.name), len(extra), 0, 0, 0, 0, _shortened(self.offset))
        return b"PK\x01\x02" + struct.pack("<H", 45 if longs else 20) + common + rest + self.name + extra

    @property
    def _is_long(self) -> bool:
        return self.nbytes >= LONG

    def _common(self, crc32: int, size: int) -> bytes:
        version = 45 if self._is_long or self.offset >= LONG else 20
        date = 0x21  # 1 January 1980, the first that zip can say
        return struct.pack("<5H3L", version, 8 if self.crc_follows else 0, 0, 0, date, crc32, size, size)


def directory(records: Sequence[ArchiveRecord], at: int) -> bytes:
    """The end of an archive, which begins at byte ``at``."""
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
    return ELSEWHERE if number >= LONG else number


def beginning(description: bytes) -> tuple[bytes, list[ArchiveRecord]]:
    """The first bytes of an archive, with all records but the payloads."""
    data, records = b"", []
    for name, content in ((b"data.pkl", description), (b"byteorder", b"little"), (b"version", b"3\n")):
        record = ArchiveRecord(b"archive/" + name, len(data), len(content), zlib.crc32(content))
        records.append(record)
        data += record.local_header() + content
    return data, records


def payload_record(number: int, offset: int, nbytes: int, crc32: int = 0) -> ArchiveRecord:
    """Of the elements of tensor ``number``."""
    return ArchiveRecord(b"archive/data/%d" % number, offset, nbytes, crc32, crc_follows=True)


def payload_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """The length of a payload."""
    return math.prod(shape) * dtype.itemsize


class _Storage:
    """Stands for the storage of the tensor while the tensor is pickled."""

    def __init__(self, number: int, dtype: torch.dtype, nbytes: int) -> None:
        if dtype in STORAGE_CLASSES:
            kind, numel = getattr(torch, STORAGE_CLASSES[dtype]), nbytes // dtype.itemsize
        else:
            kind, numel = torch.UntypedStorage, nbytes
        self.persistent_id = ("storage", kind, str(number), "cpu", numel)


class Stub:
    """Pickled as a contiguous tensor is, but has no elements: those of record ``data/<number>`` are its."""

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
    """The record ``data.pkl``."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()
