"""Items and metadata as ``torch.distributed.checkpoint`` (DCP) stores them, written without a copy of the payload.

[Note: items]
A ``.distcp`` file is a sequence of items, and an item of a tensor is what ``torch.save`` makes of it: a zip archive
with the pickled description of the tensor and, stored uncompressed, its elements (torch_archive.py). Here an item is three
parts:

- *head*: all before the elements. It depends on dtype and shape only.
- *payload*: the elements, row-major, little endian, as they lie in the memory of a contiguous tensor.
- *tail*: the CRC-32 of the payload and the zip directory.
"""

from __future__ import annotations

import io
import pickle
import sys
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

from dist_asgd.boxes import Box
from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.format.manifest import Item
from dist_asgd.checkpoint.format.torch_archive import (
    ArchiveRecord,
    Stub,
    beginning,
    description,
    directory,
    payload_bytes,
    payload_record,
)

MAX_PAYLOAD = 2**30  # bytes of one item: far below the 4 GiB from which an archive needs the zip64 format
COMMITTED_BY = "committed_by"  # an attribute that DCP's Metadata does not have, and DCP does not look at
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


def stored_chunk(box: Box, item: Item) -> StoredChunk:
    """Returns where ``box`` of a tensor is stored, given the ``item`` of the manifest that holds it."""
    return StoredChunk(box, item.file, item.offset, item.stop - item.offset)


def item_head(dtype: torch.dtype, shape: Sequence[int]) -> bytes:
    """All that stands before the payload of a contiguous tensor; its length is a multiple of 64.

    Raises CheckpointError for a payload of more than 1 GiB (cut such a tensor into several boxes) and for quantized
    dtypes, whose tensors are more than their elements.
    """
    return _head(dtype, tuple(shape))[0]


def item_tail(dtype: torch.dtype, shape: Sequence[int], crc32: int) -> bytes:
    """All that stands behind a payload whose CRC-32 (``zlib.crc32``) is ``crc32``."""
    head, records = _head(dtype, tuple(shape))
    payload = payload_record(0, records[-1].offset, payload_bytes(dtype, shape), crc32)
    descriptor = payload.descriptor()
    return descriptor + directory([*records[:-1], payload], len(head) + payload.nbytes + len(descriptor))


def object_item(value: Any) -> bytes:
    """The item of a value that is not a tensor: numbers, strings, None, and lists and dicts of them."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def stock_metadata(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int], Sequence[StoredChunk]]],
    objects: Mapping[str, StoredObject],
    paths: Mapping[str, tuple[str | int, ...]],
    committed_by: str | None = None,
) -> bytes:
    """The file ``.metadata``, from which stock ``dcp.load`` learns what is where.

    ``tensors`` gives each key's dtype, whole shape and chunks, which cover it without overlapping; ``paths`` gives the
    way to each key through the nested state dict, as ``flatten_state_dict`` does; ``committed_by`` the file without
    which there is no checkpoint, for our own readers. Chunks of several keys may lie at the same place. Equal arguments
    in equal order give equal bytes.
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
    if committed_by is not None:
        setattr(metadata, COMMITTED_BY, committed_by)
    return pickle.dumps(metadata, protocol=4)


def _place(stored: StoredChunk | StoredObject) -> _StorageInfo:
    return _StorageInfo(sys.intern(stored.path), stored.offset, stored.length)


@lru_cache(maxsize=1024)
def _head(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[bytes, tuple[ArchiveRecord, ...]]:
    """The head, and the records of the archive; the last one is the payload's, without its CRC-32."""
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
    head, records = beginning(description(Stub(0, dtype, shape)))
    payload = payload_record(0, len(head), nbytes)
    return head + payload.local_header(), (*records, payload)
