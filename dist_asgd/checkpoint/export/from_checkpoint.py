"""Reads tensors of a checkpoint, or their averages, for an export: verified, and in bounded memory."""

from __future__ import annotations

import fnmatch
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch

from dist_asgd.boxes import Box, batches, grouped, whole
from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.export.formats import BATCH_BYTES, Exported
from dist_asgd.checkpoint.format.casts import rounded
from dist_asgd.checkpoint.format.crc32 import crc32
from dist_asgd.checkpoint.format.entries import Block, TensorEntry
from dist_asgd.checkpoint.format.manifest import STOCK, Manifest, TensorRecord, ValueRecord
from dist_asgd.checkpoint.format.tensor_bytes import memory
from dist_asgd.checkpoint.format.torch_archive import payload_bytes
from dist_asgd.checkpoint.loading.ranges import read_record
from dist_asgd.checkpoint.loading.reader import plan_reads, read_into
from dist_asgd.checkpoint.loading.stock_reader import plan_items, read_items_into
from dist_asgd.checkpoint.state.averages import average_keys, average_names, keys_of_average
from dist_asgd.checkpoint.state.saved_names import without_wrappers
from dist_asgd.checkpoint.state.tree import TreeNode, key_of, tree_of
from dist_asgd.checkpoint.stock.metadata import StockCheckpoint, read_stock_metadata
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.checkpoint.storage.waiting import threads

BATCHES_AHEAD = 2  # batches that threads read while the caller writes one


def tensors_of(manifest: Manifest, entry: str) -> list[Exported]:
    """Returns the tensors of an entry of the saved state, such as "model", by the names of its ``load_state_dict``.

    The names are without parts that wrappers, such as ``torch.compile`` and DistributedDataParallel, add.

    Raises:
        CheckpointError: the entry has no tensors, or two of one name.
    """
    prefix = f"{entry}."
    keys = {key: key.removeprefix(prefix) for key in manifest.tensors if key == entry or key.startswith(prefix)}
    if not keys:
        raise CheckpointError(f"the checkpoint has no tensors in an entry {entry!r}; it has {entry_names(manifest)}")
    names = without_wrappers(keys.values())
    return [_exported(names[name], key, manifest.tensors[key]) for key, name in keys.items()]


def tensors_matching(manifest: Manifest, pattern: str) -> list[Exported]:
    """Returns the tensors whose keys match ``pattern`` (``*``, ``?`` and ``[...]`` as in a shell), named by their keys.

    Raises:
        CheckpointError: no key matches.
    """
    found = [
        _exported(key, key, tensor) for key, tensor in manifest.tensors.items() if fnmatch.fnmatchcase(key, pattern)
    ]
    if not found:
        raise CheckpointError(f"no tensor of the checkpoint has a key like {pattern!r}")
    return found


def entry_names(manifest: Manifest) -> list[str]:
    """Returns the sorted names at the top of the saved state, such as "model" and "optimizer"."""
    paths = [tensor.path for tensor in manifest.tensors.values()] + [value.path for value in manifest.values.values()]
    return sorted({str(path[0]) for path in paths})


def shared_entries(manifest: Manifest) -> tuple[TreeNode, dict[str, Any]]:
    """Returns the tree of the entries that are no single rank's own, and all values by key, encoded."""
    of_all: dict[str, TensorRecord | ValueRecord] = {**manifest.tensors, **manifest.values}
    root = tree_of({key: entry.path for key, entry in of_all.items() if entry.rank is None})
    return root, {key: value.encoded for key, value in manifest.values.items()}


def _exported(name: str, key: str, tensor: TensorRecord) -> Exported:
    return Exported(name, key, tensor.saved.shape, tensor.saved.dtype)


def with_averages(source: ExportSource, tensors: Sequence[Exported], average: str | None = None) -> list[Exported]:
    """Returns the tensors with the keys of their averages (``ax``) in the state of the checkpoint's optimizers.

    Names and dtypes stay, so an export rounds the averages to the dtypes of the tensors. A checkpoint has tied weights
    under each of their names, but the optimizer's state has one of the names only. So a tensor without an average takes
    the average that all tensors of equal bytes have in common. Tensors without any average, such as buffers, are
    returned unchanged.

    Args:
        source: the checkpoint.
        tensors: tensors of the checkpoint, such as `tensors_of` returns.
        average: the name of one of several averages; None for the first.

    Raises:
        CheckpointError: no tensor has an average, there is no average of that name, several optimizers have an average
            of one tensor, the shape of an average differs, or tensors could not be read to compare their bytes.
    """
    manifest = source.manifest
    root, values = shared_entries(manifest)
    _check_name(average, average_names(root, values))
    found: dict[str, str] = {}
    for tensor in tensors:
        path = manifest.tensors[tensor.key].path
        splits = [(path[:depth], key_of(path[depth:])) for depth in range(1, len(path))]
        names = [known for above, name in splits for known in (name, key_of((*above, name)))]
        keys = set(average_keys(root, names, average, values))
        if len(keys) > 1:
            raise CheckpointError(f"several optimizers have an average of {tensor.key!r}: {sorted(keys)}")
        for key in keys:
            if manifest.tensors[key].saved.shape != tensor.shape:
                raise CheckpointError(f"{key!r} is no average of {tensor.key!r}: their shapes differ")
            found[tensor.key] = key
    if not found:
        raise CheckpointError("the checkpoint has no averages (entries like 'optimizer.state.<name>.ax') of them")
    found |= _averages_of_ties(source, [tensor.key for tensor in tensors if tensor.key not in found], found)
    return [replace(tensor, key=found.get(tensor.key, tensor.key)) for tensor in tensors]


def names_of_averages(manifest: Manifest) -> list[str]:
    """Returns the names of all averages of a checkpoint, each once; none where it has no averages."""
    return average_names(*shared_entries(manifest))


def keys_in_average(manifest: Manifest, average: str | None) -> list[str]:
    """Returns the keys of the tensors of an average, whichever optimizer or ``ShardedAverages`` has it.

    Args:
        manifest: of the checkpoint.
        average: the name of one of several averages; None for the first.

    Raises:
        CheckpointError: the checkpoint has no averages, or none of that name.
    """
    root, values = shared_entries(manifest)
    known = average_names(root, values)
    _check_name(average, known)
    if not known:
        raise CheckpointError("the checkpoint has no averages, neither an optimizer's ('ax') nor of ShardedAverages")
    return [key for key in keys_of_average(root, values, average) if key in manifest.tensors]


def _check_name(average: str | None, known: Sequence[str]) -> None:
    if average is not None and average not in known:
        raise CheckpointError(f"the checkpoint has no average {average!r}, it has {known}")


def _averages_of_ties(source: ExportSource, keys: Sequence[str], found: Mapping[str, str]) -> dict[str, str]:
    """Returns keys of averages for those ``keys`` whose tensor has equal bytes as a tensor in ``found``."""
    tensors = source.manifest.tensors
    alike = {tensors[key].saved for key in keys}
    by_fingerprint: dict[Any, list[str]] = {}
    for key, average in found.items():
        if tensors[key].saved in alike:
            by_fingerprint.setdefault(source.fingerprint(key), []).append(average)
    ties = {}
    for key in keys if by_fingerprint else ():
        averages = by_fingerprint.get(source.fingerprint(key), [])
        if len({source.fingerprint(average) for average in averages}) == 1:
            ties[key] = averages[0]
    return ties


def stock_manifest(stock: StockCheckpoint) -> Manifest:
    """Returns a manifest with the paths, shapes and dtypes of a checkpoint that torch wrote, and with nothing else."""
    tensors = {key: TensorRecord(tensor.saved, (), stock.paths[key]) for key, tensor in stock.tensors.items()}
    values = {key: ValueRecord(None, stock.paths[key]) for key in stock.objects}
    return Manifest(0, 0, 0.0, {}, {}, (), tensors, values)


@dataclass(frozen=True, slots=True)
class ExportSource:
    """Source of the tensors of a checkpoint that this library wrote."""

    storage: Storage
    directory: str  # the checkpoint's, relative to the storage's URL
    manifest: Manifest

    def fingerprint(self, key: str) -> Any:
        """Returns a value that is equal for two tensors of equal bytes that the save cut into equal chunks.

        Tensors of other bytes have another value, unless their CRC-32 happen to be equal.
        """
        tensor = self.manifest.tensors[key]
        return tensor.saved, tuple((chunk.box, self.manifest.items[chunk.item].crc32) for chunk in tensor.chunks)

    def payloads(self, tensors: Sequence[Exported]) -> Iterator[tuple[int, memoryview]]:
        """Yields the verified elements of all ``tensors`` in parts, tensor after tensor, in row-major order.

        Yields pairs of the index of a tensor in ``tensors`` and the bytes of its next part in the tensor's dtype.

        Raises:
            CheckpointError: elements could not be read or are damaged.
        """
        pending: deque[Future[list[tuple[int, memoryview]]]] = deque()
        with threads(BATCHES_AHEAD, "dist_asgd-export") as pool:
            for batch in self._batches(tensors):
                pending.append(pool.submit(self._load, tensors, batch))
                if len(pending) > BATCHES_AHEAD:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()

    def _batches(self, tensors: Sequence[Exported]) -> Iterator[list[tuple[int, Box]]]:
        """Yields lists of (index of a tensor in ``tensors``, box of it) to be read together, in row-major order."""
        saved = [self.manifest.tensors[tensor.key].saved for tensor in tensors]
        return batches([(tensor.shape, tensor.dtype.itemsize) for tensor in saved], BATCH_BYTES)

    def _read_into(self, wanted: Sequence[tuple[str, TensorEntry]]) -> None:
        read_into(self.storage, self.directory, plan_reads(self.manifest, wanted))

    def _load(self, tensors: Sequence[Exported], batch: Sequence[tuple[int, Box]]) -> list[tuple[int, memoryview]]:
        wanted, parts = [], []
        for number, box in batch:
            saved = self.manifest.tensors[tensors[number].key].saved
            part = torch.empty(box.sizes, dtype=saved.dtype, device="cpu")
            parts.append((number, part))
            wanted.append((tensors[number].key, TensorEntry(saved.shape, saved.dtype, [Block(box, part)])))
        self._read_into(wanted)
        return [(number, memory(rounded(part, tensors[number].dtype))) for number, part in parts]


@dataclass(frozen=True, slots=True)
class StockExportSource(ExportSource):
    """Source of the tensors of a checkpoint that torch.distributed.checkpoint wrote.

    Its items can be verified only as a whole, so tensors are read as a whole, and a few must fit into memory.
    """

    stock: StockCheckpoint  # ``manifest`` is made of it, and has paths, shapes and dtypes only

    @classmethod
    def open(cls, storage: Storage, directory: str) -> StockExportSource:
        """Opens the checkpoint in ``directory``. Raises CheckpointError if its ``.metadata`` is not valid."""
        stock = read_stock_metadata(read_record(storage, directory, STOCK, storage.sizes(directory)))
        return cls(storage, directory, stock_manifest(stock), stock)

    def fingerprint(self, key: str) -> Any:
        """Returns a value that is equal for two tensors of equal bytes. Reads all of the tensor."""
        saved, crc = self.manifest.tensors[key].saved, 0
        for _, data in self.payloads([_exported(key, key, self.manifest.tensors[key])]):
            crc = crc32(data, crc)
        return saved, crc

    def _batches(self, tensors: Sequence[Exported]) -> Iterator[list[tuple[int, Box]]]:
        """Yields lists of (index of a tensor in ``tensors``, box of the whole tensor) to be read together."""
        saved = [self.manifest.tensors[tensor.key].saved for tensor in tensors]
        wholes = (((n, whole(one.shape)), payload_bytes(one.dtype, one.shape)) for n, one in enumerate(saved))
        return grouped(wholes, BATCH_BYTES)

    def _read_into(self, wanted: Sequence[tuple[str, TensorEntry]]) -> None:
        read_items_into(self.storage, self.directory, plan_items(self.stock.tensors, wanted))
