"""The steps of one save: the plan of all ranks, the staging copy of asynchronous saves, the writing and the commit.

``plan_save`` and ``write`` are called by ``checkpoint/checkpointer.py``; ``write`` ends in ``commit`` of
``checkpoint/saving/commit.py``, whose [Note: commit] describes the protocol.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dist_asgd.boxes import whole, within
from dist_asgd.checkpoint.errors import CheckpointError, only_checkpoint_errors, together
from dist_asgd.checkpoint.format.entries import SavedTensor
from dist_asgd.checkpoint.format.json_values import decode
from dist_asgd.checkpoint.format.manifest import ValueRecord, key_of_rank
from dist_asgd.checkpoint.format.tensor_bytes import memory_of, narrowed
from dist_asgd.checkpoint.saving.assign import Assignment, Offer, assign, varying_keys
from dist_asgd.checkpoint.saving.commit import CommitRecord, commit
from dist_asgd.checkpoint.saving.rendezvous import Rendezvous
from dist_asgd.checkpoint.saving.writer import BlockToWrite, WriteResult, write_blocks
from dist_asgd.checkpoint.state.contents import Contents
from dist_asgd.checkpoint.state.steps import StepsTaken, require_same_steps
from dist_asgd.checkpoint.state.tree import Path
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.comm.consensus import Agreement
from dist_asgd.comm.objects import scatter_object


@dataclass(frozen=True, slots=True)
class SavePlan:
    """The share of one rank in a save."""

    directory: str  # of the checkpoint, relative to the storage; "" if the storage is that of one checkpoint
    blocks: Sequence[BlockToWrite]
    record: CommitRecord | None  # on rank 0, which commits; None on other ranks


@dataclass(frozen=True, slots=True)
class _Contribution:
    """The description of its contents that each rank sends to rank 0. All dicts are by key."""

    offers: dict[str, Offer]
    values: dict[str, Any]  # encoded; all on rank 0, on other ranks only the values that may vary between ranks
    facts: dict[str, Any]  # for entries that may vary: equal on two ranks if the entries are
    paths: dict[str, Path]  # all on rank 0, on other ranks only those of entries that may vary
    steps: dict[str, StepsTaken]


def plan_save(
    agreement: Agreement,
    step: int,
    directory: str | None,
    contents: Contents,
    latest: Callable[[], int | None] | None = None,
) -> SavePlan:
    """Plans a save on all ranks: who writes which blocks, and what the manifest records. Collective. Writes nothing.

    Args:
        step: recorded in the manifest.
        directory: name of the checkpoint's directory, on rank 0; ignored on other ranks.
        contents: of this rank. The blocks in the returned plan are views of its memory.
        latest: returns the step of the newest checkpoint of the run, for messages; None without a run.

    Raises:
        CheckpointError: on every rank: a tensor has different shapes or dtypes on two ranks, its blocks do not make it
            up, two entries get one key, or ranks of an optimizer have taken different steps.
    """
    with together(agreement, "save()"):
        contribution = _contribution(contents, agreement)
    everyone = [item for item, _ in agreement.collect(contribution, [])]
    record: CommitRecord | None = None
    answers: list[Any] = []
    with together(agreement, "save()"):
        if agreement.rank == 0:
            require_same_steps([contribution.steps for contribution in everyone], latest)
            record, assignments = _plan(step, everyone)
            answers = [(directory, assignment) for assignment in assignments]
    answer = scatter_object(answers, agreement.group)
    return SavePlan(answer[0], _blocks(answer[1], contents, agreement.rank), record)


def _contribution(contents: Contents, agreement: Agreement) -> _Contribution:
    """Describes the contents of this rank. Reads the elements of tensors only where they may vary between ranks."""
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
    return _Contribution(offers, encoded, facts, dict(paths), contents.steps)


def _crc(data: Tensor) -> int:
    crc = 0
    for piece in memory_of(data):
        crc = zlib.crc32(piece, crc)
    return crc


def _plan(step: int, everyone: Sequence[_Contribution]) -> tuple[CommitRecord, list[Assignment]]:
    """Returns the record for the commit, and by rank what it writes. Runs on rank 0.

    An entry that may vary and differs between ranks is saved once for each rank, under a key that names the rank. Any
    other entry is saved once.
    """
    varying = varying_keys([contribution.facts for contribution in everyone])
    _check_names(varying, everyone)
    tensors: dict[str, tuple[SavedTensor, Path, int | None]] = {}
    values: dict[str, ValueRecord] = {}
    offers: list[dict[str, Offer]] = []
    for rank, contribution in enumerate(everyone):
        renamed = {}
        for key, offer in contribution.offers.items():
            owner = rank if key in varying else None
            name = key if owner is None else key_of_rank(key, rank)
            renamed[name] = offer
            if name not in tensors:
                path = next(other.paths[key] for other in (everyone[0], contribution) if key in other.paths)
                tensors[name] = SavedTensor(offer.shape, offer.dtype), path, owner
        offers.append(renamed)
        for key, encoded in contribution.values.items():
            if key in varying:
                values[key_of_rank(key, rank)] = ValueRecord(encoded, contribution.paths[key], rank)
            elif rank == 0:
                values[key] = ValueRecord(encoded, contribution.paths[key])
    return CommitRecord(step, tensors, values), assign(offers)


def _check_names(varying: Collection[str], everyone: Sequence[_Contribution]) -> None:
    """Raises ``CheckpointError`` if an entry has the key under which one rank's own value of another is saved."""
    keys = {key for contribution in everyone for key in contribution.paths}
    for name in (key_of_rank(key, rank) for key in varying for rank in range(len(everyone))):
        if name in keys:
            raise CheckpointError(f"two entries have the key {name}: one so named, and a rank's of another. Rename one")


def _blocks(assignment: Assignment, contents: Contents, rank: int) -> list[BlockToWrite]:
    """Returns the assigned boxes with their data, as views of the contents."""
    blocks = []
    for name, box, offered in assignment.boxes:
        entry = contents.tensors.get(name) or contents.tensors[name.removesuffix(key_of_rank("", rank))]
        data = next(block.data for block in entry.blocks if block.box == offered)
        blocks.append(BlockToWrite(name, box, narrowed(data.detach(), within(box, offered)), box == whole(entry.shape)))
    return blocks


def stage(blocks: Sequence[BlockToWrite], buffer: Tensor | None) -> tuple[list[BlockToWrite], Tensor]:
    """Copies the blocks into one buffer on the CPU, so that the training may change its tensors when this returns.

    Synchronizes the current CUDA device if any block is on a GPU; the buffer is in pinned memory then.

    Args:
        buffer: 1-D uint8 from an earlier call, reused if it is large enough; None to allocate one.

    Returns:
        The blocks, with data in the buffer, and the buffer.
    """
    offsets, size = [], 0
    for block in blocks:
        offsets.append(size)
        size += -(-block.data.numel() * block.data.element_size() // 64) * 64
    is_cuda = any(block.data.is_cuda for block in blocks)
    if buffer is None or len(buffer) < size:
        buffer = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=is_cuda)
    staged = []
    for block, start in zip(blocks, offsets, strict=True):
        nbytes = block.data.numel() * block.data.element_size()
        copy = buffer[start : start + nbytes].view(block.data.dtype).view(block.data.shape)
        staged.append(replace(block, data=copy.copy_(block.data, non_blocking=True)))
    if is_cuda:
        torch.cuda.synchronize()
    return staged, buffer


def write(storage: Storage, plan: SavePlan, rendezvous: Rendezvous, rank: int) -> None:
    """Writes this rank's file; rank 0 commits when all ranks have written. Returns when the checkpoint exists.

    These are steps 2 to 5 of [Note: commit] in ``checkpoint/saving/commit.py``. Every rank must call it, but it runs no
    collectives, so it may run in a thread beside the training.

    Raises:
        CheckpointError: on every rank, if any rank fails before the commit; then the checkpoint does not exist.
    """
    with only_checkpoint_errors(), rendezvous:
        values = {} if plan.record is None else plan.record.values
        objects = {key: decode(value.encoded, key) for key, value in values.items()}
        result = write_blocks(storage, plan.directory, rank, plan.blocks, objects, rendezvous.check)
        rendezvous.submit(result.to_json())
        if plan.record is None:
            rendezvous.wait_for_outcome()
            return
        commit(storage, plan.directory, plan.record, [WriteResult.from_json(data) for data in rendezvous.collect()])
        rendezvous.announce("committed")
