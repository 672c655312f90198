"""The commit of a checkpoint: the record that makes the files of all ranks exist as one checkpoint.

The order of writing, below the checkpoint's own new directory:

1. Each rank writes its file of tensors, ``__<rank>_0.distcp`` (saving/writer.py).
2. When all ranks have reported their files, rank 0 compares their sizes with the store's listing.
3. Rank 0 creates ``.metadata``, by which torch.distributed.checkpoint reads the directory.
4. Rank 0 creates ``manifest.json``, which names every file, byte range and checksum.

The checkpoint exists from the moment in which ``manifest.json`` exists, and not before: both files are created
exclusively and whole. A crash before step 4 leaves a directory without a manifest, which loads ignore and a later save
sweeps away (checkpoint/retention.py). A crash after step 4 leaves a complete checkpoint.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.format.dcp_metadata import StoredChunk, StoredObject, stock_metadata
from dist_asgd.checkpoint.format.entries import SavedTensor
from dist_asgd.checkpoint.format.manifest import (
    NAME,
    STOCK,
    Chunk,
    FileRecord,
    Manifest,
    TensorRecord,
    ValueRecord,
    in_directory,
    key_of_rank,
    write_manifest,
)
from dist_asgd.checkpoint.saving.writer import Written
from dist_asgd.checkpoint.storage.storage import Storage

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """What rank 0 needs for the manifest besides what ranks have written."""

    step: int
    tensors: Mapping[str, tuple[SavedTensor, Path, int | None]]  # with the path and, of ranks' own entries, the rank
    values: Mapping[str, ValueRecord]


def commit(storage: Storage, directory: str, record: CommitRecord, parts: Sequence[Written]) -> None:
    """Checks that all is there, and writes the record without which a checkpoint does not exist."""
    found = storage.sizes(directory)
    for name, size in [entry for written in parts for entry in written.files.items()]:
        if found.get(name) != size:
            raise CheckpointError(
                f"{in_directory(directory, name)} below {storage.url} has {found.get(name)} bytes, {size} were written"
            )
    manifest, stock = _manifest(record, parts)
    storage.create(in_directory(directory, STOCK), stock)
    storage.create(in_directory(directory, NAME), write_manifest(manifest))


def _manifest(record: CommitRecord, parts: Sequence[Written]) -> tuple[Manifest, bytes]:
    items = [item for written in parts for item in written.items]
    chunks: dict[str, list[Chunk]] = {key: [] for key in record.tensors}
    first = 0
    for written in parts:
        for key, box, index in written.chunks:
            chunks[key].append(Chunk(box, first + index))
        first += len(written.items)
    tensors = {
        key: TensorRecord(saved, tuple(chunks[key]), path, rank)
        for key, (saved, path, rank) in sorted(record.tensors.items())
    }
    stored = {
        key: (tensor.saved.dtype, tensor.saved.shape, [_stored(chunk, items) for chunk in tensor.chunks])
        for key, tensor in tensors.items()
    }
    objects = {key: StoredObject(file, at, size) for written in parts for key, file, at, size in written.objects}
    paths = {key: _stock_path(tensor.path, tensor.rank) for key, tensor in tensors.items()}
    paths |= {key: _stock_path(value.path, value.rank) for key, value in record.values.items()}
    stock = stock_metadata(stored, objects, paths, committed_by=NAME)
    files = {name: FileRecord(size) for written in parts for name, size in written.files.items()}
    files[STOCK] = FileRecord(len(stock), hashlib.sha256(stock).hexdigest())
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    manifest = Manifest(record.step, len(parts), time.time(), versions, files, tuple(items), tensors, record.values)
    return manifest, stock


def _stock_path(path: Path, rank: int | None) -> Path:
    return path if rank is None else (*path[:-1], key_of_rank(str(path[-1]), rank))


def _stored(chunk: Chunk, items: Sequence[Any]) -> StoredChunk:
    item = items[chunk.item]
    return StoredChunk(chunk.box, item.file, item.offset, item.stop - item.offset)
