"""The commit of a checkpoint: rank 0 creates ``.metadata`` and then ``manifest.json``, which makes it exist.

A directory is a checkpoint if and only if it has a ``manifest.json``. That file is created last, exclusively and
atomically, and the directory is never written to again. ``Checkpointer.save`` and ``save`` in
``checkpoint/checkpointer.py`` lead here through ``write`` in ``checkpoint/saving/save.py``.

[Note: commit]
The steps of a save, in order:

1. *Plan* (``plan_save``, collective). Rank 0 picks a new directory name and tells each rank which blocks to write.
   Nothing is written.
2. *Write* (``write_blocks``, every rank by itself). A rank with something to write writes one file,
   ``__<rank>_0.distcp``. The file appears under that name when it is whole and durable; until then its bytes are in a
   temporary file or in an unfinished upload.
3. *Report* (``Rendezvous.submit``). Each rank sends rank 0 the sizes, places and checksums of what it has written.
   Rank 0 waits until every rank has reported, has failed, or has given no sign of life for 30 s, or
   for the timeout of the process group if that is shorter.
4. *Commit* (``commit``, rank 0 only). A ``Checkpointer`` adds the save to the history of its run, which fails if
   another writer has saved meanwhile ([Note: history] in ``checkpoint/run/history.py``). At the same time rank 0
   compares the sizes of the files in the storage with the reported sizes, and then creates ``.metadata``, the index
   that ``torch.distributed.checkpoint`` (DCP) reads. After all of this it creates ``manifest.json``, which has the
   sha256 of ``.metadata`` and the checksums of all items. Both files are created by requests that fail if the file
   exists.
5. *Announce* (``Rendezvous.announce``). The other ranks learn that the checkpoint exists, and ``save`` returns on them.
6. *Retention* (``delete_outdated``, rank 0 of a ``Checkpointer``). Older checkpoints are deleted only after the commit,
   ``manifest.json`` first.

What a crash leaves, by the step in which it happens:

- In 2 or 3: a directory with some of the ranks' files, temporary files or unfinished uploads, and neither
  ``.metadata`` nor ``manifest.json``. Every reader ignores it or refuses it.
- In 4, before ``manifest.json``: all data, and perhaps ``.metadata``. DCP can load it then, and it is whole. Readers of
  this package refuse it: ``.metadata`` names ``manifest.json`` as the file that commits it, and that file is missing.
  The history may have the save. If the run went back to an older step, the newer checkpoints are abandoned then, and
  are still there.
- In 5, after ``manifest.json`` was created: a checkpoint. ``save`` raises on ranks that were not told, but the next
  ``load`` finds the checkpoint.
- In 6: the new checkpoint, and older ones that are either whole or have no ``manifest.json`` any more.

An attempt without ``manifest.json`` is deleted by the retention of a later save, one hour after its last change. A rank
that fails without dying reports its error in place of step 3; then every rank raises and nothing is committed.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.format.dcp_metadata import StoredObject, stock_metadata, stored_chunk
from dist_asgd.checkpoint.format.entries import SavedTensor
from dist_asgd.checkpoint.format.json_values import decode
from dist_asgd.checkpoint.format.manifest import (
    MANIFEST,
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
from dist_asgd.checkpoint.saving.writer import WriteResult
from dist_asgd.checkpoint.state.tree import Path
from dist_asgd.checkpoint.storage.storage import Storage


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """The part of the manifest that rank 0 knows from the plan, before anything is written."""

    step: int
    # Each tensor with its path in the nested state, and with the rank if every rank saves a tensor of its own there.
    tensors: Mapping[str, tuple[SavedTensor, Path, int | None]]
    values: Mapping[str, ValueRecord]


def stock_values(record: CommitRecord) -> dict[str, Any]:
    """Returns the values that are written for DCP, by key.

    Outlines of mappings are left out: DCP would take them for values in the place of what the mappings hold.
    """
    paths = [*(path for _, path, _ in record.tensors.values()), *(value.path for value in record.values.values())]
    above = {path[:depth] for path in paths for depth in range(1, len(path))}
    return {key: decode(value.encoded, key) for key, value in record.values.items() if value.path not in above}


def commit(
    storage: Storage,
    directory: str,
    record: CommitRecord,
    results: Sequence[WriteResult],
    register: Callable[[], None],
) -> None:
    """Makes a checkpoint exist, if all of its files are there (step 4 of [Note: commit]). Called on rank 0 only.

    Args:
        directory: of the checkpoint, relative to ``storage``; "" if the storage is that of one checkpoint.
        results: what each rank has written, by rank.
        register: called in a thread meanwhile; no checkpoint comes into existence if it raises.

    Raises:
        CheckpointError: a file is missing or has another size than was written, or ``register`` raised.
        OSError: the storage failed, or ``.metadata`` or ``manifest.json`` exists already.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="dist_asgd-register") as pool:  # at once, as each costs round trips
        registered = pool.submit(register)
        _require_files(storage, directory, results)
        manifest, stock = _manifest(record, results)
        storage.create(in_directory(directory, STOCK), stock)
        registered.result()
    storage.create(in_directory(directory, MANIFEST), write_manifest(manifest))  # from here on the checkpoint exists


def _require_files(storage: Storage, directory: str, results: Sequence[WriteResult]) -> None:
    """Raises ``CheckpointError`` if a file is missing or has another size than was written."""
    found = storage.sizes(directory)
    for name, size in [entry for result in results for entry in result.files.items()]:
        if found.get(name) != size:
            raise CheckpointError(
                f"{in_directory(directory, name)} below {storage.url} has {found.get(name)} bytes, {size} were written"
            )


def _manifest(record: CommitRecord, results: Sequence[WriteResult]) -> tuple[Manifest, bytes]:
    """Returns the manifest and the bytes of ``.metadata``, whose sha256 the manifest has."""
    items = [item for result in results for item in result.items]
    chunks: dict[str, list[Chunk]] = {key: [] for key in record.tensors}
    first = 0
    for result in results:
        for key, box, index in result.chunks:
            chunks[key].append(Chunk(box, first + index))
        first += len(result.items)
    tensors = {
        key: TensorRecord(saved, tuple(chunks[key]), path, rank)
        for key, (saved, path, rank) in sorted(record.tensors.items())
    }
    stored = {
        key: (
            tensor.saved.dtype,
            tensor.saved.shape,
            [stored_chunk(chunk.box, items[chunk.item]) for chunk in tensor.chunks],
        )
        for key, tensor in tensors.items()
    }
    objects = {key: StoredObject(file, at, size) for result in results for key, file, at, size in result.objects}
    paths = {key: _stock_path(tensor.path, tensor.rank) for key, tensor in tensors.items()}
    paths |= {key: _stock_path(record.values[key].path, record.values[key].rank) for key in objects}
    stock = stock_metadata(stored, objects, paths, committed_by=MANIFEST)
    files = {name: FileRecord(size) for result in results for name, size in result.files.items()}
    files[STOCK] = FileRecord(len(stock), hashlib.sha256(stock).hexdigest())
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    manifest = Manifest(record.step, len(results), time.time(), versions, files, tuple(items), tensors, record.values)
    return manifest, stock


def _stock_path(path: Path, rank: int | None) -> Path:
    """Returns the path under which DCP finds an entry: the last name of a rank's own entry ends in the rank."""
    return path if rank is None else (*path[:-1], key_of_rank(str(path[-1]), rank))
