"""A checkpoint's tensors, or their averages, for files of other formats: verified, and in bounded memory."""

from __future__ import annotations

import fnmatch
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from dist_asgd.boxes import Box, batches, whole
from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.export.formats import Exported
from dist_asgd.checkpoint.format.entries import Block, TensorEntry
from dist_asgd.checkpoint.format.manifest import STOCK, Manifest, TensorRecord, ValueRecord, in_directory
from dist_asgd.checkpoint.format.tensor_bytes import memory
from dist_asgd.checkpoint.format.torch_archive import payload_bytes
from dist_asgd.checkpoint.loading.reader import plan_reads, read_into
from dist_asgd.checkpoint.loading.stock_reader import plan_items
from dist_asgd.checkpoint.loading.stock_reader import read_items_into
from dist_asgd.checkpoint.state.averages import average_keys, average_names
from dist_asgd.checkpoint.state.tree import key_of, tree_of
from dist_asgd.checkpoint.stock.metadata import StockCheckpoint, read_stock_metadata
from dist_asgd.checkpoint.storage.storage import Storage

BATCH = 16 * 2**20  # bytes that are read together
BATCHES_AHEAD = 2  # batches that are read while one is written


def tensors_of(manifest: Manifest, entry: str) -> list[Exported]:
    """The tensors of an entry of the saved state, such as ``model``, by the names that its ``load_state_dict`` has."""
    prefix = f"{entry}."
    found = [
        _exported(key.removeprefix(prefix), key, tensor)
        for key, tensor in manifest.tensors.items()
        if key == entry or key.startswith(prefix)
    ]
    if not found:
        raise CheckpointError(f"the checkpoint has no tensors in an entry {entry!r}; it has {entries(manifest)}")
    return found


def matching(manifest: Manifest, pattern: str) -> list[Exported]:
    """The tensors whose keys match a pattern with ``*``, ``?`` and ``[...]``, by their keys."""
    found = [
        _exported(key, key, tensor) for key, tensor in manifest.tensors.items() if fnmatch.fnmatchcase(key, pattern)
    ]
    if not found:
        raise CheckpointError(f"no tensor of the checkpoint has a key like {pattern!r}")
    return found


def entries(manifest: Manifest) -> list[str]:
    """What was saved, by its names."""
    paths = [tensor.path for tensor in manifest.tensors.values()] + [value.path for value in manifest.values.values()]
    return sorted({str(path[0]) for path in paths})


def _exported(name: str, key: str, tensor: TensorRecord) -> Exported:
    return Exported(name, key, tensor.saved.shape, tensor.saved.dtype)


def averaged(source: ExportSource, tensors: Sequence[Exported], average: str | None = None) -> list[Exported]:
    """With the averages (``ax``) that optimizers of the checkpoint have of them, rounded to the dtypes of the tensors.

    Tied weights are saved under each of their names, and the optimizer knows one of them: a tensor without an average
    that has the same bytes as one with an average takes it, too. Others, such as buffers, stay as they are.

    Args:
        average: the name of one of several averages; None for the first.

    Raises:
        CheckpointError: none has an average, or one of that name; several optimizers have one, or it is of another
            shape.
    """
    manifest = source.manifest
    of_all: dict[str, TensorRecord | ValueRecord] = {**manifest.tensors, **manifest.values}
    root = tree_of({key: entry.path for key, entry in of_all.items() if entry.rank is None})
    values = {key: value.encoded for key, value in manifest.values.items()}
    if average is not None and average not in (known := average_names(root, values)):
        raise CheckpointError(f"the checkpoint has no average {average!r}, it has {known}")
    found: dict[str, str] = {}
    for tensor in tensors:
        path = manifest.tensors[tensor.key].path
        splits = [(path[:depth], key_of(path[depth:])) for depth in range(1, len(path))]
        keys = {key for above, name in splits for key in average_keys(root, above, name, average, values)}
        if len(keys) > 1:
            raise CheckpointError(f"several optimizers have an average of {tensor.key!r}: {sorted(keys)}")
        for key in keys:
            if manifest.tensors[key].saved.shape != tensor.shape:
                raise CheckpointError(f"{key!r} is no average of {tensor.key!r}: their shapes differ")
            found[tensor.key] = key
    if not found:
        raise CheckpointError("the checkpoint has no averages (entries like 'optimizer.state.<name>.ax') of them")
    found |= _ties(source, [tensor.key for tensor in tensors if tensor.key not in found], found)
    return [replace(tensor, key=found.get(tensor.key, tensor.key)) for tensor in tensors]


def _ties(source: ExportSource, keys: Sequence[str], found: Mapping[str, str]) -> dict[str, str]:
    tensors = source.manifest.tensors
    alike = {tensors[key].saved for key in keys}
    by_content: dict[Any, list[str]] = {}
    for key, average in found.items():
        if tensors[key].saved in alike:
            by_content.setdefault(source.content(key), []).append(average)
    ties = {}
    for key in keys if by_content else ():
        averages = by_content.get(source.content(key), [])
        if len({source.content(average) for average in averages}) == 1:
            ties[key] = averages[0]
    return ties


@dataclass(frozen=True, slots=True)
class ExportSource:
    """A checkpoint that is read from."""

    storage: Storage
    directory: str
    manifest: Manifest

    def content(self, key: str) -> Any:
        """Equal for tensors with the same bytes that were cut in the same way."""
        tensor = self.manifest.tensors[key]
        return tensor.saved, tuple((chunk.box, self.manifest.items[chunk.item].crc32) for chunk in tensor.chunks)

    def payloads(self, tensors: Sequence[Exported]) -> Iterator[tuple[int, memoryview]]:
        """(number of the tensor, a part of its elements in row-major order), one after another, verified."""
        pending: deque[Future[list[tuple[int, memoryview]]]] = deque()
        with ThreadPoolExecutor(BATCHES_AHEAD, thread_name_prefix="dist_asgd-export") as pool:
            try:
                for batch in self._batches(tensors):
                    pending.append(pool.submit(self._read, tensors, batch))
                    if len(pending) > BATCHES_AHEAD:
                        yield from pending.popleft().result()
                while pending:
                    yield from pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def _batches(self, tensors: Sequence[Exported]) -> Iterator[list[tuple[int, Box]]]:
        saved = [self.manifest.tensors[tensor.key].saved for tensor in tensors]
        return batches([(tensor.shape, tensor.dtype.itemsize) for tensor in saved], BATCH)

    def _fill(self, wanted: Sequence[tuple[str, TensorEntry]]) -> None:
        read_into(self.storage, self.directory, plan_reads(self.manifest, wanted))

    def _read(self, tensors: Sequence[Exported], batch: Sequence[tuple[int, Box]]) -> list[tuple[int, memoryview]]:
        wanted, parts = [], []
        for number, box in batch:
            saved = self.manifest.tensors[tensors[number].key].saved
            part = torch.empty(box.sizes, dtype=saved.dtype, device="cpu")
            parts.append((number, part))
            wanted.append((tensors[number].key, TensorEntry(saved.shape, saved.dtype, [Block(box, part)])))
        self._fill(wanted)
        return [(number, memory(part.to(tensors[number].dtype))) for number, part in parts]


@dataclass(frozen=True, slots=True)
class StockExportSource(ExportSource):
    """One of ``torch.distributed.checkpoint``; its manifest tells paths, shapes and dtypes only.

    Parts can be verified as a whole only, so tensors are read as a whole: some of them have to fit into memory.
    """

    stock: StockCheckpoint

    @classmethod
    def open(cls, storage: Storage, directory: str) -> StockExportSource:
        stock = read_stock_metadata(storage.read(in_directory(directory, STOCK)))
        tensors = {key: TensorRecord(tensor.saved, (), stock.paths[key]) for key, tensor in stock.tensors.items()}
        values = {key: ValueRecord(None, stock.paths[key]) for key in stock.objects}
        return cls(storage, directory, Manifest(0, 0, 0.0, {}, {}, (), tensors, values), stock)

    def content(self, key: str) -> Any:
        saved, crc = self.manifest.tensors[key].saved, 0
        for _, data in self.payloads([_exported(key, key, self.manifest.tensors[key])]):
            crc = zlib.crc32(data, crc)
        return saved, crc

    def _batches(self, tensors: Sequence[Exported]) -> Iterator[list[tuple[int, Box]]]:
        batch: list[tuple[int, Box]] = []
        size = 0
        for number, tensor in enumerate(tensors):
            saved = self.manifest.tensors[tensor.key].saved
            if batch and size + payload_bytes(saved.dtype, saved.shape) > BATCH:
                yield batch
                batch, size = [], 0
            batch.append((number, whole(saved.shape)))
            size += payload_bytes(saved.dtype, saved.shape)
        yield batch

    def _fill(self, wanted: Sequence[tuple[str, TensorEntry]]) -> None:
        read_items_into(self.storage, self.directory, plan_items(self.stock.tensors, wanted))
