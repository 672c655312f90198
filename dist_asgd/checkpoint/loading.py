"""One checkpoint on its way in: what ranks are told of it, what is read, and the one moment when live state changes."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist

from dist_asgd.agreement import Agreement
from dist_asgd.checkpoint.contents import destination_of
from dist_asgd.checkpoint.entries import CheckpointError
from dist_asgd.checkpoint.manifest import NAME, STOCK, Manifest, TensorRecord, ValueRecord, in_directory, read_manifest
from dist_asgd.checkpoint.nesting import key_of
from dist_asgd.checkpoint.problems import Problems
from dist_asgd.checkpoint.reader import Verified, plan_reads, plan_rest, verify
from dist_asgd.checkpoint.rendezvous import together
from dist_asgd.checkpoint.storage import Storage


def open_checkpoint(storage: Storage, directory: str) -> bytes:
    """The manifest of a checkpoint whose files are all there, in their full size.

    Verifies what no rank reads: what is there for ``torch.distributed.checkpoint`` only.

    Raises:
        CheckpointError: it does not exist, or is damaged.
    """
    found, url = storage.sizes(directory), in_directory(storage.url, directory)
    if NAME not in found:
        raise CheckpointError(f"{url} is no checkpoint: it has no {NAME}, which is written when all ranks have saved")
    data = storage.read(in_directory(directory, NAME))
    with _named(url):
        manifest = read_manifest(data)
    for name, file in manifest.files.items():
        if found.get(name) != file.size:
            what = "is missing" if name not in found else f"has {found[name]} bytes, and should have {file.size}"
            raise CheckpointError(f"{url}/{name} {what}: the checkpoint is damaged")
    with _named(url):
        _verify_rest(storage, directory, manifest)
    return data


def _verify_rest(storage: Storage, directory: str, manifest: Manifest) -> None:
    requests = plan_rest(manifest)
    ranges = [(in_directory(directory, request.file), request.start, request.stop) for request in requests]
    ranges.append((in_directory(directory, STOCK), 0, manifest.files[STOCK].size))
    for index, data in storage.read_ranges(ranges):
        if index < len(requests):
            verify(requests[index], data)
        elif hashlib.sha256(data).hexdigest() != manifest.files[STOCK].sha256:
            raise CheckpointError(f"{STOCK} is damaged: it does not have the sha256 that {NAME} has of it")


@contextlib.contextmanager
def _named(url: str) -> Iterator[None]:
    """Tells which checkpoint an error is about."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{url}: {error}") from error.__cause__


def load_checkpoint(
    agreement: Agreement,
    storage: Storage,
    directory: str,
    state: Mapping[str, Any],
    *,
    strict: bool,
    average: bool,
) -> Manifest:
    """Fills ``state`` from a checkpoint. Collective; every rank gets the same ``directory``.

    Raises:
        CheckpointError: on every rank, with nothing changed, if it does not fit or a byte that is needed is damaged.
            With a part of it loaded, if a ``load_state_dict`` raises.
    """
    url = in_directory(storage.url, directory)
    with together(agreement, "load()"):
        data = open_checkpoint(storage, directory) if agreement.rank == 0 else b""
    manifest = read_manifest(_broadcast(agreement, data))
    tensors, encoded = _seen_by(agreement.rank, manifest)
    with together(agreement, "load()"), _named(url):
        saved = {key: record.saved for key, (_, record) in tensors.items()}
        values = {key: record.encoded for key, record in encoded.items()}
        paths = {key_of(record.path): record.path for record in manifest.tensors.values()}
        paths |= {key_of(record.path): record.path for record in manifest.values.values()}
        destination = destination_of(state, saved, values, paths, strict=strict, average=average)
    problems = Problems()
    for found in agreement.gather(destination.problems):
        problems = problems.merge(found)
    if problems:
        raise CheckpointError(f"{url} does not fit what it is loaded into\n{problems.message()}")
    wanted = [(tensors[key][0], entry) for key, entries in destination.tensors.items() for entry in entries]
    with Verified(storage, directory, plan_reads(manifest, wanted)) as verified:
        with together(agreement, "load()"), _named(url):
            verified.read()
        with together(agreement, "load()"), _named(url):
            verified.apply()
    with together(agreement, "load()"), _taken(url):
        destination.finish()
    return manifest


@contextlib.contextmanager
def _taken(url: str) -> Iterator[None]:
    """Tells that it is too late to change nothing."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"{url} is whole, but what was saved there is not accepted: {type(error).__name__}: {error}. The state is "
            "loaded in part now"
        ) from error


def _seen_by(rank: int, manifest: Manifest) -> tuple[dict[str, tuple[str, TensorRecord]], dict[str, ValueRecord]]:
    """The entries that this rank may take, by their keys: those of all, and its own where ranks had different ones."""
    tensors = {
        key_of(record.path): (name, record) for name, record in manifest.tensors.items() if record.rank in (None, rank)
    }
    own = {key_of(record.path): record for record in manifest.values.values() if record.rank in (None, rank)}
    return tensors, own


def _broadcast(agreement: Agreement, data: bytes) -> bytes:
    if agreement.group is None:
        return data
    box = [data]
    dist.broadcast_object_list(box, group=agreement.group, group_src=0)
    return box[0]
