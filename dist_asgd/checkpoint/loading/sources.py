"""Opened checkpoints: those of this library and those of ``torch.distributed.checkpoint`` (DCP), with one interface."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from dist_asgd.checkpoint.errors import CheckpointError, DamagedCheckpoint, naming, together
from dist_asgd.checkpoint.format.entries import SavedTensor, TensorEntry
from dist_asgd.checkpoint.format.json_values import Values, decode
from dist_asgd.checkpoint.format.manifest import (
    MANIFEST,
    STOCK,
    Manifest,
    TensorRecord,
    ValueRecord,
    check_size,
    in_directory,
    read_manifest,
)
from dist_asgd.checkpoint.format.manifest_rules import FormatError, check_paths
from dist_asgd.checkpoint.loading.exchange import SharedParts, split_shared
from dist_asgd.checkpoint.loading.ranges import range_of, read_record
from dist_asgd.checkpoint.loading.reader import (
    VerifiedBlocks,
    chunk_parts,
    plan_parts,
    plan_value_reads,
    require_equal_ties,
    verify_request,
)
from dist_asgd.checkpoint.loading.spool import VerifiedRead
from dist_asgd.checkpoint.loading.stock_reader import VerifiedItems, plan_items, read_objects
from dist_asgd.checkpoint.run.directories import directories_of
from dist_asgd.checkpoint.state.sharing import first_of, subgroup_of
from dist_asgd.checkpoint.state.tree import Path, key_of, leaves
from dist_asgd.checkpoint.stock.items import item_object
from dist_asgd.checkpoint.stock.metadata import StockCheckpoint, read_stock_metadata
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.comm.consensus import Agreement

Destinations = Iterable[tuple[str, TensorEntry]]  # keys, each with a live tensor to be filled


@dataclass(frozen=True, slots=True)
class CheckpointSource(ABC):
    """One checkpoint as one rank sees it.

    The keys of ``tensors``, ``values`` and ``paths`` are paths joined by dots. An entry of which each rank saved its
    own has such a key, too, and is the one of this rank.
    """

    is_stock: ClassVar[bool]  # DCP flattened the state: then all keys of dicts are strings, and empty dicts are missing

    storage: Storage
    directory: str  # relative to the storage; "" if the storage is that of one checkpoint
    tensors: Mapping[str, SavedTensor]
    values: Mapping[str, Any]  # decoded at each access, which raises CheckpointError for a damaged value
    paths: Mapping[str, Path]  # of all entries; on a rank that did not save, also of entries that only others have
    owners: Mapping[str, Sequence[int]]  # the ranks that have saved their own of an entry, by key
    viewers: Mapping[Path, int]  # rank whose own entries are taken below a path, if it is not this rank

    @property
    def url(self) -> str:
        """The URL of the checkpoint, without credentials."""
        return in_directory(self.storage.url, self.directory)

    @abstractmethod
    def plan_reads(self, agreement: Agreement, wanted: Destinations) -> tuple[VerifiedRead, SharedParts | None]:
        """Returns what fills ``wanted``: the reads of this rank, and the parts that ranks share, if any. Collective."""


@dataclass(frozen=True, slots=True)
class OwnSource(CheckpointSource):
    """A checkpoint of this library."""

    is_stock = False

    manifest: Manifest
    records: Mapping[str, str]  # key -> key in the manifest, which names the rank of a rank's own entry

    def plan_reads(self, agreement: Agreement, wanted: Destinations) -> tuple[VerifiedRead, SharedParts | None]:
        shared = None
        with together(agreement, "load()"), naming(self.url):
            own = chunk_parts(self.manifest, [(self.records[key], entry) for key, entry in wanted])
            require_equal_ties(self.manifest, own)
        if not self.storage.is_local:  # the page cache of a local file system serves repeated reads from memory
            own, everyone, mine = split_shared(agreement, own)
            if any(everyone):
                shared = SharedParts(self.storage, self.directory, self.manifest, everyone, mine)
        return VerifiedBlocks(self.storage, self.directory, plan_parts(self.manifest, own)), shared


@dataclass(frozen=True, slots=True)
class DcpSource(CheckpointSource):
    """A checkpoint that stock ``torch.distributed.checkpoint`` wrote."""

    is_stock = True

    found: StockCheckpoint

    def plan_reads(self, agreement: Agreement, wanted: Destinations) -> tuple[VerifiedRead, SharedParts | None]:
        return VerifiedItems(self.storage, self.directory, plan_items(self.found.tensors, wanted)), None


def open_source(
    agreement: Agreement, storage: Storage, directory: str, state: Mapping[str, Any], *, stock: bool, trust: bool
) -> CheckpointSource:
    """Opens a checkpoint on all ranks. Collective; ``directory``, ``stock`` and ``trust`` must be equal on every rank.

    Rank 0 reads the manifest, or the ``.metadata`` and the values of a DCP checkpoint, and sends them to the others.

    Args:
        directory: relative to ``storage``; "" if the storage is that of one checkpoint.
        state: what this rank loads; empty for everything.
        stock: whether a directory with ``.metadata`` and without ``manifest.json`` is read as a DCP checkpoint.
        trust: whether values of a DCP checkpoint are unpickled, which can run any code.

    Raises:
        DamagedCheckpoint: on every rank: a checkpoint of this library is damaged.
        CheckpointError: on every rank: there is no checkpoint, or one of DCP is damaged.
    """
    url = in_directory(storage.url, directory)
    with together(agreement, "load()"):
        opened = _opened(storage, directory, stock) if agreement.rank == 0 else (True, b"")
    has_manifest, data = agreement.broadcast(opened)
    if has_manifest:
        with together(agreement, "load()"):
            return _own_source(storage, directory, read_manifest(data), agreement.rank, viewers_of(state, agreement))
    with together(agreement, "load()"), naming(url):
        found = read_stock_metadata(data, trust)
        _check_stock(found, storage.sizes(directory) if agreement.rank == 0 else None)
    asked = [set(names) for names in agreement.gather(list(map(str, state)))]
    everything = not all(asked)
    objects = {
        key: place
        for key, place in found.objects.items()
        if everything or str(found.paths[key][0]) in set().union(*asked)
    }
    with together(agreement, "load()"), naming(url):
        read = read_objects(storage, directory, objects) if agreement.rank == 0 else {}
    values = Values(agreement.broadcast(read), lambda item, key: _value(item, key, trust))
    tensors = {key: tensor.saved for key, tensor in found.tensors.items()}
    return DcpSource(storage, directory, tensors, values, found.paths, {}, {}, found)


def open_checkpoint(storage: Storage, directory: str) -> bytes:
    """Returns the bytes of ``manifest.json`` of a checkpoint whose files all exist in their full size. Not collective.

    Verifies the bytes that no load of tensors would verify: ``.metadata``, and the values for stock readers.

    Raises:
        CheckpointError: the checkpoint does not exist.
        DamagedCheckpoint: the checkpoint is damaged.
    """
    return _opened(storage, directory, False)[1]


def _opened(storage: Storage, directory: str, stock: bool) -> tuple[bool, bytes]:
    """Returns (True, bytes of ``manifest.json``), or (False, bytes of ``.metadata``) for a DCP checkpoint."""
    found, url = storage.sizes(directory), in_directory(storage.url, directory)
    if MANIFEST not in found and stock and STOCK in found:
        return False, read_record(storage, directory, STOCK, found)
    if MANIFEST not in found:
        raise CheckpointError(_what_is_there(storage, url, found, stock))
    data = read_record(storage, directory, MANIFEST, found)
    with naming(url):
        manifest = read_manifest(data)
    for name, file in manifest.files.items():
        if found.get(name) != file.size:
            what = "is missing" if name not in found else f"has {found[name]} bytes, and should have {file.size}"
            raise DamagedCheckpoint(f"{url}/{name} {what}: the checkpoint is damaged")
    with naming(url):
        _verify_stock_files(storage, directory, manifest)
    return True, data


def _what_is_there(storage: Storage, url: str, found: Iterable[str], stock: bool) -> str:
    """Returns the error for a place without a checkpoint; ``found`` are the paths of its files."""
    if any(directory.is_committed for directory in directories_of(found)):
        return f"{url} is the directory of a run: Checkpointer(url).load(state) loads its newest checkpoint"
    if not found and storage.is_file():
        return f"{url} is a file: a checkpoint is a directory"
    what = f"neither {MANIFEST} nor {STOCK}, one of which" if stock else f"no {MANIFEST}, which"
    return f"{url} is no checkpoint: it has {what} is written when all ranks have saved"


def _verify_stock_files(storage: Storage, directory: str, manifest: Manifest) -> None:
    """Verifies what is in a checkpoint of this library for DCP only: ``.metadata`` and the items of values."""
    check_size(manifest.files[STOCK].size, STOCK)
    requests = plan_value_reads(manifest)
    ranges = [(in_directory(directory, request.file), request.start, request.stop) for request in requests]
    ranges.append((in_directory(directory, STOCK), 0, manifest.files[STOCK].size))
    for index, data in storage.read_ranges(ranges):
        if index < len(requests):
            verify_request(requests[index], data)
        elif hashlib.sha256(data).hexdigest() != manifest.files[STOCK].sha256:
            raise DamagedCheckpoint(f"{STOCK} is damaged: it does not have the sha256 that {MANIFEST} has of it")


def viewers_of(state: Mapping[str, Any], agreement: Agreement) -> dict[Path, int]:
    """Returns the rank that saves for this one, by path, of optimizers on subgroups of the ranks."""
    found = {
        leaf.path: first_of(subgroup_of(leaf.value), agreement.ranks) for leaf in leaves(state) if not leaf.per_rank
    }
    return {path: rank for path, rank in found.items() if rank is not None}


def _own_source(
    storage: Storage, directory: str, manifest: Manifest, rank: int, viewers: Mapping[Path, int]
) -> OwnSource:
    """Returns the source with the entries for ``rank``: entries of all ranks, and the rank's own ones.

    Args:
        viewers: as in ``CheckpointSource``.
    """

    def is_mine(record: TensorRecord | ValueRecord) -> bool:
        if record.rank is None:
            return True
        return record.rank == next((r for path, r in viewers.items() if record.path[: len(path)] == path), rank)

    mine: dict[str, tuple[str, TensorRecord]] = {
        key_of(record.path): (name, record) for name, record in manifest.tensors.items() if is_mine(record)
    }
    values = {key_of(record.path): record.encoded for record in manifest.values.values() if is_mine(record)}
    everyone: list[TensorRecord | ValueRecord] = [*manifest.tensors.values(), *manifest.values.values()]
    # Entries of other ranks are not missing on a rank that took part in the save. On a rank that did not, they are
    # listed here, so that strict loading reports them as missing.
    is_new = rank >= manifest.world_size
    paths = {key_of(record.path): record.path for record in everyone if is_new or is_mine(record)}
    owners: dict[str, list[int]] = {}
    for record in everyone:
        if record.rank is not None:
            owners.setdefault(key_of(record.path), []).append(record.rank)
    tensors = {key: record.saved for key, (_, record) in mine.items()}
    records = {key: name for key, (name, _) in mine.items()}
    found = Values(values, decode)
    return OwnSource(storage, directory, tensors, found, paths, owners, viewers, manifest, records)


def _check_stock(found: StockCheckpoint, sizes: Mapping[str, int] | None) -> None:
    """Raises ``CheckpointError`` if the paths of entries conflict, or files are missing or too short.

    Args:
        sizes: of the files, by name; None to check the paths only.
    """
    try:
        check_paths([(path, None) for path in found.paths.values()], ())
    except FormatError as error:
        raise CheckpointError(f"{STOCK} is not valid: {error}") from None
    if sizes is None:
        return
    ranges = [range_of(stored) for stored in found.objects.values()]
    ranges += [range_of(chunk) for tensor in found.tensors.values() for chunk in tensor.chunks]
    ends: dict[str, int] = {}
    for name, _, stop in ranges:
        ends[name] = max(ends.get(name, 0), stop)
    for name, end in ends.items():
        if sizes.get(name, -1) < end:
            what = "is missing" if name not in sizes else f"has {sizes[name]} bytes, and {end} are needed"
            raise CheckpointError(f"{name} {what}: the checkpoint is damaged")


def _value(item: bytes, key: str, trust: bool) -> Any:
    with naming(repr(key)):
        return item_object(item, trust)
