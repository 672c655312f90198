"""One checkpoint on its way out: the plan that ranks make together, the writing, and the commit."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dist_asgd.boxes import whole, within
from dist_asgd.checkpoint.errors import CheckpointError, only_checkpoint_errors, together
from dist_asgd.checkpoint.format.entries import SavedTensor
from dist_asgd.checkpoint.format.json_values import decode
from dist_asgd.checkpoint.format.manifest import (
    ValueRecord,
    key_of_rank,
)
from dist_asgd.checkpoint.format.tensor_bytes import memory_of, narrowed
from dist_asgd.checkpoint.saving.assign import Offer, Share, assign, varying_keys
from dist_asgd.checkpoint.saving.commit import CommitRecord, Path, commit
from dist_asgd.checkpoint.saving.rendezvous import Rendezvous
from dist_asgd.checkpoint.saving.writer import BlockToWrite, Written, write_parts
from dist_asgd.checkpoint.state.contents import Contents
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.comm.consensus import Agreement
from dist_asgd.comm.objects import scatter_object


@dataclass(frozen=True, slots=True)
class SavePlan:
    """What one rank has to do for a checkpoint."""

    directory: str
    parts: Sequence[BlockToWrite]
    record: CommitRecord | None  # on rank 0


@dataclass(frozen=True, slots=True)
class _Contribution:
    """What each rank tells rank 0 of its contents."""

    offers: dict[str, Offer]
    values: dict[str, Any]  # encoded; on ranks but 0 those that may vary
    facts: dict[str, Any]  # of entries that may vary: equal where the entries are
    paths: dict[str, Path]


def plan_save(agreement: Agreement, step: int, directory: str | None, contents: Contents) -> SavePlan:
    """Collective. ``directory`` on rank 0: of the new checkpoint."""
    with together(agreement, "save()"):
        brought = _contribution(contents, agreement)
    everyone = [item for item, _ in agreement.collect(brought, [])]
    record: CommitRecord | None = None
    answers: list[Any] = []
    with together(agreement, "save()"):
        if agreement.rank == 0:
            record, shares = _plan(step, everyone)
            answers = [(directory, share) for share in shares]
    answer = scatter_object(answers, agreement.group)
    return SavePlan(answer[0], _parts(answer[1], contents, agreement.rank), record)


def _contribution(contents: Contents, agreement: Agreement) -> _Contribution:
    varying = contents.varying if agreement.world_size > 1 else frozenset()
    offers = {
        key: Offer(entry.shape, entry.dtype, tuple(block.box for block in entry.blocks))
        for key, entry in contents.tensors.items()
        if entry.blocks
    }
    encoded = {key: value for key, value in contents.values.items() if agreement.rank == 0 or key in varying}
    facts = {key: value for key, value in encoded.items() if key in varying}
    for key in varying & contents.tensors.keys():
        entry = contents.tensors[key]
        facts[key] = (entry.shape, str(entry.dtype), [_crc(block.data) for block in entry.blocks])
    paths = contents.paths if agreement.rank == 0 else {key: contents.paths[key] for key in varying}
    return _Contribution(offers, encoded, facts, dict(paths))


def _crc(data: Tensor) -> int:
    crc = 0
    for piece in memory_of(data):
        crc = zlib.crc32(piece, crc)
    return crc


def _plan(step: int, everyone: Sequence[_Contribution]) -> tuple[CommitRecord, list[Share]]:
    """Entries that differ between ranks are renamed, and each rank's is kept; of the others, one."""
    varying = varying_keys([brought.facts for brought in everyone])
    _check_names(varying, everyone)
    tensors: dict[str, tuple[SavedTensor, Path, int | None]] = {}
    kept: dict[str, ValueRecord] = {}
    offers: list[dict[str, Offer]] = []
    for rank, brought in enumerate(everyone):
        renamed = {}
        for key, offer in brought.offers.items():
            own = rank if key in varying else None
            name = key if own is None else key_of_rank(key, rank)
            renamed[name] = offer
            if name not in tensors:
                path = next(other.paths[key] for other in (everyone[0], brought) if key in other.paths)
                tensors[name] = SavedTensor(offer.shape, offer.dtype), path, own
        offers.append(renamed)
        for key, encoded in brought.values.items():
            if key in varying:
                kept[key_of_rank(key, rank)] = ValueRecord(encoded, brought.paths[key], rank)
            elif rank == 0:
                kept[key] = ValueRecord(encoded, brought.paths[key])
    return CommitRecord(step, tensors, kept), assign(offers)


def _check_names(varying: Collection[str], everyone: Sequence[_Contribution]) -> None:
    """Raises ``CheckpointError`` where an entry has the name that one rank's of another entry gets."""
    taken = {key for brought in everyone for key in brought.paths}
    for name in (key_of_rank(key, rank) for key in varying for rank in range(len(everyone))):
        if name in taken:
            raise CheckpointError(f"two entries have the key {name}: one so named, and a rank's of another. Rename one")


def _parts(share: Share, contents: Contents, rank: int) -> list[BlockToWrite]:
    parts = []
    for name, box, offered in share.boxes:
        entry = contents.tensors.get(name) or contents.tensors[name.removesuffix(key_of_rank("", rank))]
        data = next(block.data for block in entry.blocks if block.box == offered)
        parts.append(BlockToWrite(name, box, narrowed(data.detach(), within(box, offered)), box == whole(entry.shape)))
    return parts


def stage(parts: Sequence[BlockToWrite], buffer: Tensor | None) -> tuple[list[BlockToWrite], Tensor]:
    """Copies of the parts in one buffer on the CPU, which is taken again if it is large enough.

    The training may go on when this returns.
    """
    spots, size = [], 0
    for part in parts:
        spots.append(size)
        size += -(-part.data.numel() * part.data.element_size() // 64) * 64
    if buffer is None or len(buffer) < size:
        pinned = any(part.data.is_cuda for part in parts)
        buffer = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    staged = []
    for part, start in zip(parts, spots, strict=True):
        nbytes = part.data.numel() * part.data.element_size()
        copy = buffer[start : start + nbytes].view(part.data.dtype).view(part.data.shape)
        staged.append(replace(part, data=copy.copy_(part.data, non_blocking=True)))
    if any(part.data.is_cuda for part in parts):
        torch.cuda.synchronize()
    return staged, buffer


def write(storage: Storage, plan: SavePlan, meeting: Rendezvous, rank: int) -> None:
    """Writes this rank's part; when all ranks have, rank 0 commits. Returns, on every rank, when that is done.

    No collectives. Raises on every rank if one has failed.
    """
    with only_checkpoint_errors(), meeting:
        values = {} if plan.record is None else plan.record.values
        objects = {key: decode(value.encoded, key) for key, value in values.items()}
        written = write_parts(storage, plan.directory, rank, plan.parts, objects, meeting.check)
        meeting.bring(written.to_json())
        if plan.record is None:
            meeting.verdict()
            return
        commit(storage, plan.directory, plan.record, [Written.from_json(part) for part in meeting.collect()])
        meeting.conclude("committed")
