"""Checkpoints to load from, ours and those of ``torch.distributed.checkpoint`` (DCP): what a rank may take of them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dist_asgd.checkpoint.errors import CheckpointError, naming, together
from dist_asgd.checkpoint.format.dcp_metadata import StoredChunk, StoredObject
from dist_asgd.checkpoint.format.entries import SavedTensor, TensorEntry
from dist_asgd.checkpoint.format.json_values import Values, decode
from dist_asgd.checkpoint.format.manifest import (
    NAME,
    STOCK,
    Manifest,
    TensorRecord,
    ValueRecord,
    in_directory,
    read_manifest,
)
from dist_asgd.checkpoint.format.manifest_rules import FormatError, check_paths
from dist_asgd.checkpoint.loading.exchange import SharedParts, shared
from dist_asgd.checkpoint.loading.reader import VerifiedBlocks, parts_of, plan_parts, plan_rest, verify_range
from dist_asgd.checkpoint.loading.spool import Verified
from dist_asgd.checkpoint.loading.stock_reader import VerifiedItems, plan_items, read_objects
from dist_asgd.checkpoint.state.tree import Path, key_of
from dist_asgd.checkpoint.stock.items import item_object
from dist_asgd.checkpoint.stock.metadata import StockCheckpoint, read_stock_metadata
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.comm.consensus import Agreement
from dist_asgd.comm.objects import broadcast_object

Destinations = Iterable[tuple[str, TensorEntry]]  # keys, with tensors to be filled


@dataclass(frozen=True, slots=True)
class CheckpointSource(ABC):
    """One checkpoint as one rank sees it. Keys are those of paths, also for entries that each rank has its own of."""

    storage: Storage
    directory: str
    tensors: Mapping[str, SavedTensor]
    values: Mapping[str, Any]  # an access raises CheckpointError for damaged ones
    paths: Mapping[str, Path]  # of all entries; for a rank that did not save, also of those that only other ranks have

    @property
    def url(self) -> str:
        return in_directory(self.storage.url, self.directory)

    @property
    @abstractmethod
    def is_stock(self) -> bool:
        """Whether DCP took the state apart: it makes strings of all keys, and leaves out what is empty."""

    @abstractmethod
    def reading(self, agreement: Agreement, wanted: Destinations) -> tuple[Verified, SharedParts | None]:
        """What fills the blocks of ``wanted``: what this rank reads for itself, and what ranks share. Collective."""


@dataclass(frozen=True, slots=True)
class OwnSource(CheckpointSource):
    manifest: Manifest
    records: Mapping[str, str]  # keys in the manifest

    @property
    def is_stock(self) -> bool:
        return False

    def reading(self, agreement: Agreement, wanted: Destinations) -> tuple[Verified, SharedParts | None]:
        own, among_all = parts_of(self.manifest, [(self.records[key], entry) for key, entry in wanted]), None
        if not self.storage.is_local:  # what a local file system was asked for once, it has in memory
            own, everyone, mine = shared(agreement, own)
            if any(everyone):
                among_all = SharedParts(self.storage, self.directory, self.manifest, everyone, mine)
        return VerifiedBlocks(self.storage, self.directory, plan_parts(self.manifest, own)), among_all


@dataclass(frozen=True, slots=True)
class DcpSource(CheckpointSource):
    found: StockCheckpoint

    @property
    def is_stock(self) -> bool:
        return True

    def reading(self, agreement: Agreement, wanted: Destinations) -> tuple[Verified, SharedParts | None]:
        return VerifiedItems(self.storage, self.directory, plan_items(self.found.tensors, wanted)), None


def source_of(
    agreement: Agreement, storage: Storage, directory: str, names: Iterable[str], *, stock: bool, trust: bool
) -> CheckpointSource:
    """Opens a checkpoint. Collective; every rank gets the same ``directory``.

    Args:
        names: of the entries at the top of the state that this rank loads; none for all that there are.
        stock: where there is no manifest, read what stock ``dcp.save`` wrote.
        trust: unpickle values of such a checkpoint.

    Raises:
        CheckpointError: on every rank: there is none, or it is damaged.
    """
    url = in_directory(storage.url, directory)
    with together(agreement, "load()"):
        opened = _opened(storage, directory, stock) if agreement.rank == 0 else (True, b"")
    is_ours, data = broadcast_object(opened, agreement.group)
    if is_ours:
        return _ours(storage, directory, read_manifest(data), agreement.rank)
    with together(agreement, "load()"), naming(url):
        found = read_stock_metadata(data, trust)
        _check(found, storage.sizes(directory) if agreement.rank == 0 else None)
    asked = [set(names) for names in agreement.gather(list(names))]
    everything = not all(asked)
    objects = {
        key: place
        for key, place in found.objects.items()
        if everything or str(found.paths[key][0]) in set().union(*asked)
    }
    with together(agreement, "load()"), naming(url):
        read = read_objects(storage, directory, objects) if agreement.rank == 0 else {}
    values = Values(broadcast_object(read, agreement.group), lambda item, key: _value(item, key, trust))
    tensors = {key: tensor.saved for key, tensor in found.tensors.items()}
    return DcpSource(storage, directory, tensors, values, found.paths, found)


def open_checkpoint(storage: Storage, directory: str) -> bytes:
    """The manifest of a checkpoint whose files are all there, in their full size.

    Verifies what no rank reads: what is there for ``torch.distributed.checkpoint`` only.

    Raises:
        CheckpointError: it does not exist, or is damaged.
    """
    return _opened(storage, directory, False)[1]


def _opened(storage: Storage, directory: str, stock: bool) -> tuple[bool, bytes]:
    """Whether it has a manifest, and that or the file ``.metadata``."""
    found, url = storage.sizes(directory), in_directory(storage.url, directory)
    if NAME not in found and stock and STOCK in found:
        return False, storage.read(in_directory(directory, STOCK))
    if NAME not in found:
        what = f"neither {NAME} nor {STOCK}, one of which" if stock else f"no {NAME}, which"
        raise CheckpointError(f"{url} is no checkpoint: it has {what} is written when all ranks have saved")
    data = storage.read(in_directory(directory, NAME))
    with naming(url):
        manifest = read_manifest(data)
    for name, file in manifest.files.items():
        if found.get(name) != file.size:
            what = "is missing" if name not in found else f"has {found[name]} bytes, and should have {file.size}"
            raise CheckpointError(f"{url}/{name} {what}: the checkpoint is damaged")
    with naming(url):
        _verify_rest(storage, directory, manifest)
    return True, data


def _verify_rest(storage: Storage, directory: str, manifest: Manifest) -> None:
    requests = plan_rest(manifest)
    ranges = [(in_directory(directory, request.file), request.start, request.stop) for request in requests]
    ranges.append((in_directory(directory, STOCK), 0, manifest.files[STOCK].size))
    for index, data in storage.read_ranges(ranges):
        if index < len(requests):
            verify_range(requests[index], data)
        elif hashlib.sha256(data).hexdigest() != manifest.files[STOCK].sha256:
            raise CheckpointError(f"{STOCK} is damaged: it does not have the sha256 that {NAME} has of it")


def _ours(storage: Storage, directory: str, manifest: Manifest, rank: int) -> OwnSource:
    """The entries that this rank may take: those of all, and its own where ranks had different ones."""
    mine: dict[str, tuple[str, TensorRecord]] = {
        key_of(record.path): (name, record) for name, record in manifest.tensors.items() if record.rank in (None, rank)
    }
    values = {key_of(record.path): record.encoded for record in manifest.values.values() if record.rank in (None, rank)}
    everyone: list[TensorRecord | ValueRecord] = [*manifest.tensors.values(), *manifest.values.values()]
    # A rank that has saved lacks nothing that only others had. One that is new does: it is told so.
    is_new = rank >= manifest.world_size
    paths = {key_of(record.path): record.path for record in everyone if is_new or record.rank in (None, rank)}
    tensors = {key: record.saved for key, (_, record) in mine.items()}
    records = {key: name for key, (name, _) in mine.items()}
    return OwnSource(storage, directory, tensors, Values(values, decode), paths, manifest, records)


def _check(found: StockCheckpoint, sizes: Mapping[str, int] | None) -> None:
    """Raises CheckpointError where entries are in each other, or parts of files are missing; ``sizes`` if known."""
    try:
        check_paths([(path, None) for path in found.paths.values()], ())
    except FormatError as error:
        raise CheckpointError(f"{STOCK} is not valid: {error}") from None
    if sizes is None:
        return
    places: list[StoredChunk | StoredObject] = list(found.objects.values())
    places += [chunk for tensor in found.tensors.values() for chunk in tensor.chunks]
    ends: dict[str, int] = {}
    for place in places:
        ends[place.path] = max(ends.get(place.path, 0), place.offset + place.length)
    for name, end in ends.items():
        if sizes.get(name, -1) < end:
            what = "is missing" if name not in sizes else f"has {sizes[name]} bytes, and {end} are needed"
            raise CheckpointError(f"{name} {what}: the checkpoint is damaged")


def _value(item: bytes, key: str, trust: bool) -> Any:
    try:
        return item_object(item, trust)
    except CheckpointError as error:
        raise CheckpointError(f"{key!r}: {error}") from error
