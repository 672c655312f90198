"""Makes items and ``.metadata`` in the format of ``torch.distributed.checkpoint`` (DCP), without copying payloads.

[Note: items]
A ``.distcp`` file is a sequence of items. The item of a tensor is what ``torch.save`` makes of the tensor: a zip
archive with its pickled description and, uncompressed, its elements (format/torch_archive.py). An item has three parts:

- *head*: everything before the elements. It depends on dtype and shape only.
- *payload*: the elements, row-major, little endian, like the memory of a contiguous tensor.
- *tail*: the CRC-32 of the payload and the zip directory.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dist_asgd._torch_private import StorageInfo
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

MAX_PAYLOAD = 2**30  # bytes of one item, far below the 4 GiB from which on an archive needs the zip64 format
COMMITTED_BY = "committed_by"  # an attribute that this library adds to DCP's Metadata, and DCP ignores


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A box of a tensor, and where its item is stored."""

    box: Box
    path: str  # the file, relative to the checkpoint's directory, with "/" between parts
    offset: int  # bytes before the item in the file
    length: int  # bytes of the item, head and tail included


@dataclass(frozen=True, slots=True)
class StoredObject:
    """Where the item of a value that is no tensor is stored."""

    path: str  # the file, relative to the checkpoint's directory
    offset: int  # bytes before the item in the file
    length: int  # bytes of the item


def stored_chunk(box: Box, item: Item) -> StoredChunk:
    """Returns where ``box`` of a tensor is stored, given the ``item`` of the manifest that holds it."""
    return StoredChunk(box, item.file, item.offset, item.stop - item.offset)


def item_head(dtype: torch.dtype, shape: Sequence[int]) -> bytes:
    """Returns the bytes of an item before the payload of a contiguous tensor; their number is a multiple of 64.

    Raises:
        CheckpointError: the payload has more than ``MAX_PAYLOAD`` bytes, so the tensor must be cut into several boxes.
    """
    return _head(dtype, tuple(shape))[0]


def item_tail(dtype: torch.dtype, shape: Sequence[int], crc32: int) -> bytes:
    """Returns the bytes of an item behind a payload whose CRC-32 (``zlib.crc32``) is ``crc32``.

    Raises CheckpointError as ``item_head`` does.
    """
    head, records = _head(dtype, tuple(shape))
    payload = payload_record(0, records[-1].offset, payload_bytes(dtype, shape), crc32)
    descriptor = payload.descriptor()
    return descriptor + directory([*records[:-1], payload], len(head) + payload.nbytes + len(descriptor))


def object_item(value: Any) -> bytes:
    """Returns the item of a value that is no tensor: a number, a string, None, or lists and dicts of these."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def stock_metadata(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int], Sequence[StoredChunk]]],
    objects: Mapping[str, StoredObject],
    paths: Mapping[str, tuple[str | int, ...]],
    committed_by: str | None = None,
) -> bytes:
    """Returns the bytes of the file ``.metadata``, by which torch's ``dcp.load`` finds entries in files.

    Equal arguments in equal order give equal bytes.

    Args:
        tensors: by key, the dtype, the shape of the whole tensor, and chunks that cover it without overlapping. Chunks
            of several keys may be stored in one place.
        objects: by key, where values that are no tensors are stored.
        paths: by key, the path through the nested state dict, as torch's ``flatten_state_dict`` gives it.
        committed_by: name of the file without which this library takes the checkpoint for unfinished. DCP ignores it.
    """
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, StorageInfo] = {}
    for name, (dtype, shape, chunks) in tensors.items():
        key = sys.intern(name)
        described = []
        for index, chunk in enumerate(chunks):
            offsets = torch.Size(chunk.box.offsets)
            described.append(ChunkStorageMetadata(offsets=offsets, sizes=torch.Size(chunk.box.sizes)))
            places[MetadataIndex(key, offsets, index)] = _storage_info(chunk)
        entries[key] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), described)
    for name, stored in objects.items():
        key = sys.intern(name)
        entries[key] = BytesStorageMetadata()
        places[MetadataIndex(key)] = _storage_info(stored)
    # pickle refers to a string that it has written before by identity: interned strings make equal bytes.
    ways = {
        sys.intern(key): tuple([sys.intern(part) if isinstance(part, str) else part for part in path])
        for key, path in paths.items()
    }
    metadata = Metadata(state_dict_metadata=entries, planner_data=ways, storage_data=places)
    metadata.version = sys.intern("1.0.0")  # by assignment, as torch does it: in some releases it is no field
    if committed_by is not None:
        setattr(metadata, COMMITTED_BY, committed_by)
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, protocol=4)
    # So the file does not depend on the version of torch that writes it.
    pickler.dispatch_table = {**copyreg.dispatch_table, TensorProperties: _reduce_properties}
    pickler.dump(metadata)
    return buffer.getvalue()


def _reduce_properties(properties: TensorProperties) -> tuple[Any, ...]:
    """Returns how ``properties`` are pickled: with the five fields that every torch reads.

    torch 2.15 appends a sixth, the strides of a tensor, and earlier ones refuse a state of six.
    """
    make, arguments, state, *_ = tuple(properties.__reduce_ex__(4))
    return make, arguments, state[:5]


def _storage_info(stored: StoredChunk | StoredObject) -> StorageInfo:
    return StorageInfo(sys.intern(stored.path), stored.offset, stored.length)


@lru_cache(maxsize=1024)
def _head(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[bytes, tuple[ArchiveRecord, ...]]:
    """Returns the head, and the records of the archive, of which the last is the payload's, without its CRC-32."""
    nbytes = payload_bytes(dtype, shape)
    if nbytes > MAX_PAYLOAD:
        raise CheckpointError(
            f"an item of shape {shape} and {dtype} has {nbytes} bytes, more than {MAX_PAYLOAD}: "
            "store the tensor as several smaller boxes"
        )
    head, records = beginning(description(Stub(0, dtype, shape)))
    payload = payload_record(0, len(head), nbytes)
    return head + payload.local_header(), (*records, payload)
