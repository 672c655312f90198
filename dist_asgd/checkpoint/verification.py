"""Reads all of a checkpoint, in bounded memory, and tells everything that is wrong with it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from dist_asgd.checkpoint.distcp import StoredChunk, StoredObject
from dist_asgd.checkpoint.entries import CheckpointError
from dist_asgd.checkpoint.foreign import StockCheckpoint, StockTensor, read_stock_metadata
from dist_asgd.checkpoint.manifest import NAME, STOCK, Item, Manifest, in_directory, read_manifest
from dist_asgd.checkpoint.storage import Storage
from dist_asgd.checkpoint.values import decode

PIECE = 8 * 2**20  # bytes that are read together

Report = Callable[[int, int], None]  # bytes that were verified just now, of how many in all


@dataclass(frozen=True, slots=True)
class Fault:
    file: str
    key: str | None  # of the entry, where it is known
    text: str


@dataclass(frozen=True, slots=True)
class Piece:
    """Blocks of an item."""

    key: str
    item: Item
    blocks: range


def verify(storage: Storage, directory: str, report: Report) -> Iterator[Fault]:
    """What is wrong with a checkpoint that has a manifest. Every byte of it is read."""
    sizes = storage.sizes(directory)
    try:
        manifest = read_manifest(storage.read(in_directory(directory, NAME)))
    except CheckpointError as error:
        yield Fault(NAME, None, f"{error}. Without it nothing else can be verified")
        return
    yield from _files(manifest, sizes)
    yield from _values(manifest)
    present = {name for name, file in manifest.files.items() if sizes.get(name) == file.size}
    stock: StockCheckpoint | None = None
    if STOCK in present:
        data = storage.read(in_directory(directory, STOCK))
        if hashlib.sha256(data).hexdigest() != manifest.files[STOCK].sha256:
            yield Fault(STOCK, None, f"it does not have the sha256 in {NAME}")
        else:
            try:
                stock = read_stock_metadata(data)
            except CheckpointError as error:
                yield Fault(STOCK, None, str(error))
    if stock is not None:
        yield from _agreement(manifest, stock)
