"""The steps of one save: the plan of all ranks, the writing and the commit.

``plan_save`` and ``write`` are called by ``checkpoint/checkpointer.py``; ``write`` ends in ``commit`` of
``checkpoint/saving/commit.py``, whose [Note: commit] describes the protocol.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dist_asgd.boxes import whole, within
from dist_asgd.checkpoint.errors import CheckpointError, only_checkpoint_errors, together
from dist_asgd.checkpoint.format.entries import SavedTensor
from dist_asgd.checkpoint.format.manifest import ValueRecord, check_places, key_of_rank
from dist_asgd.checkpoint.format.manifest_rules import FormatError
from dist_asgd.checkpoint.format.tensor_bytes import narrowed
from dist_asgd.checkpoint.saving.assign import Assignment, Offer, assign
from dist_asgd.checkpoint.saving.commit import CommitRecord, commit, stock_values
from dist_asgd.checkpoint.saving.differences import Differences
from dist_asgd.checkpoint.saving.rendezvous import Rendezvous
from dist_asgd.checkpoint.saving.writer import BlockToWrite, WriteResult, write_blocks
from dist_asgd.checkpoint.state.contents import Contents
from dist_asgd.checkpoint.state.sharing import Sharing, first_of
from dist_asgd.checkpoint.state.steps import StepsTaken, require_same_steps
from dist_asgd.checkpoint.state.tree import Path
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.checkpoint.storage.waiting import giving_up_when
from dist_asgd.comm.consensus import Agreement, fingerprint
from dist_asgd.comm.digests import digests
from dist_asgd.comm.profiling import profiled


@dataclass(frozen=True, slots=True)
class SavePlan:
    """The share of one rank in a save."""

    directory: str  # of the checkpoint, relative to the storage; "" if the storage is that of one checkpoint
    blocks: Sequence[BlockToWrite]
    record: CommitRecord | None  # on rank 0, which commits; None on other ranks


class Owned(NamedTuple):
    """The copy that a rank has of an entry which is not ``Sharing.EQUAL``."""

    sharing: Sharing
    owner: int  # the rank that names the copy
    whole: str  # key of what is kept apart as a whole, if any of it is: an optimizer, or the entry


@dataclass(frozen=True, slots=True)
class _Contribution:
    """The description of its contents that each rank sends to rank 0. All dicts are by key."""

    offers: dict[str, Offer]
    # Values and paths are all there on rank 0, and on every rank if ranks have different keys. Otherwise other ranks
    # have those of entries that are not Sharing.EQUAL only.
    values: dict[str, Any]  # encoded
    paths: dict[str, Path]
    codes: dict[str, int]  # fingerprints of values and facts that ranks with Sharing.EQUAL and SUBGROUP must have equal
    owned: dict[str, Owned]  # of entries that are not Sharing.EQUAL
    steps: dict[str, StepsTaken]  # of optimizers

    def has(self, key: str) -> bool:
        return key in self.offers or key in self.codes or key in self.owned

    def entry(self, key: str) -> object:
        """Returns what is equal on two ranks if the entry is."""
        return self.offers.get(key, self.values.get(key, _ABSENT))


_ABSENT = object()


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
        CheckpointError: on every rank: ranks have different elements, shapes or dtypes of what is saved once for all,
            blocks of a tensor do not make it up, two entries get one key, or ranks of an optimizer have taken different
            steps.
    """
    with together(agreement, "save()"):
        owned = _owned(contents, agreement)
        offers = _offers(contents, owned, compared=agreement.world_size > 1)
        keys = fingerprint(sorted(contents.paths))
    high, minus_low = agreement.maximum("save()", [keys, -keys])
    contribution = _contribution(contents, offers, owned, everything=agreement.rank == 0 or high != -minus_low)
    everyone = [item for item, _ in agreement.collect(contribution, [])]
    record: CommitRecord | None = None
    answers: list[Any] = []
    with together(agreement, "save()"):
        if agreement.rank == 0:
            require_same_steps([contribution.steps for contribution in everyone], latest)
            record, assignments = _plan(step, everyone)
            answers = [(directory, assignment) for assignment in assignments]
    answer = agreement.scatter(answers)
    return SavePlan(answer[0], _blocks(answer[1], contents, owned), record)


def _owned(contents: Contents, agreement: Agreement) -> dict[str, Owned]:
    """Returns the copies that this rank has of entries that are not ``Sharing.EQUAL``, by key."""
    owned: dict[str, Owned] = {}
    for key, sharing in contents.sharing.items():
        if sharing is Sharing.SUBGROUP:
            optimizer, ranks = contents.subgroups[key]
            if (first := first_of(ranks, agreement.ranks)) is not None:
                owned[key] = Owned(sharing, first, optimizer)
        elif sharing is not Sharing.EQUAL:
            owned[key] = Owned(sharing, agreement.rank, key)
    return owned


def _offers(contents: Contents, owned: Mapping[str, Owned], compared: bool) -> dict[str, Offer]:
    """Returns the blocks that this rank has, by key. Reads the elements of tensors that are to be ``compared``."""
    tensors = {key: entry for key, entry in contents.tensors.items() if entry.blocks}
    alone = (Sharing.FIRST, Sharing.OWN)
    keys = [key for key in tensors if compared and not (key in owned and owned[key].sharing in alone)]
    found = iter(digests([block.data for key in keys for block in tensors[key].blocks]))
    known = {key: tuple(itertools.islice(found, len(tensors[key].blocks))) for key in keys}
    return {
        key: Offer(entry.shape, entry.dtype, tuple(block.box for block in entry.blocks), known.get(key, ()))
        for key, entry in tensors.items()
    }


def _contribution(
    contents: Contents, offers: dict[str, Offer], owned: dict[str, Owned], everything: bool
) -> _Contribution:
    values = {key: value for key, value in contents.values.items() if everything or key in owned}
    paths = {key: path for key, path in contents.paths.items() if everything or key in owned}
    compared = (Sharing.EQUAL, Sharing.SUBGROUP)
    codes = {key: value for key, value in contents.values.items() if contents.sharing[key] in compared}
    codes |= contents.facts
    fingerprints = {key: fingerprint(value) for key, value in codes.items()}
    return _Contribution(offers, values, paths, fingerprints, owned, contents.steps)


def _plan(step: int, everyone: Sequence[_Contribution]) -> tuple[CommitRecord, list[Assignment]]:
    """Returns the record for the commit, and by rank what it writes. Runs on rank 0.

    An entry that is kept apart is saved once for each rank or process group, under a key that names its lowest rank.
    Any other entry is saved once.
    """
    apart = _kept_apart(everyone)
    _check_names(apart, everyone)
    tensors: dict[str, tuple[SavedTensor, Path, int | None]] = {}
    values: dict[str, ValueRecord] = {}
    offers: list[dict[str, Offer]] = []
    codes: dict[str, dict[int, int]] = {}
    for rank, contribution in enumerate(everyone):
        owners = {key: copy.owner for key, copy in contribution.owned.items() if key in apart}
        names = {key: key_of_rank(key, owner) for key, owner in owners.items()}
        offers.append({names.get(key, key): offer for key, offer in contribution.offers.items()})
        for key, offer in contribution.offers.items():
            if (name := names.get(key, key)) not in tensors:
                path = everyone[0].paths[key] if key in everyone[0].paths else contribution.paths[key]
                tensors[name] = SavedTensor(offer.shape, offer.dtype), path, owners.get(key)
        for key, encoded in contribution.values.items():
            record = ValueRecord(encoded, contribution.paths[key], owners.get(key))
            values.setdefault(names.get(key, key), record)
        for key, code in contribution.codes.items():
            codes.setdefault(names.get(key, key), {})[rank] = code
    differences = Differences()
    for name, by_rank in codes.items():
        differences.compare(name, by_rank)
    assignments = assign(offers, differences)
    differences.require_none()
    try:
        check_places([(path, rank) for _, path, rank in tensors.values()], values)
    except FormatError as error:
        raise CheckpointError(
            f"{error}. Ranks have different things in one place: give them names of their own"
        ) from None
    return CommitRecord(step, tensors, values), assignments


def _kept_apart(everyone: Sequence[_Contribution]) -> set[str]:
    """Returns the keys of entries of which each rank or process group keeps its own.

    Raises ``CheckpointError`` where ranks share an entry in different ways.
    """
    known = {key: copy for contribution in everyone for key, copy in contribution.owned.items()}
    wholes = set()
    for key, (sharing, _, together_with) in known.items():
        holders = [contribution for contribution in everyone if contribution.has(key)]
        if any(key not in holder.owned or holder.owned[key].sharing is not sharing for holder in holders):
            raise CheckpointError(
                f"ranks save {key!r} in different ways: in PerRank, or in a module, an optimizer or by itself. Save it "
                "in the same way on every rank"
            )
        copies = [contribution.entry(key) for contribution in everyone]
        if sharing is Sharing.SUBGROUP:
            copies = _copies_of_subgroups(key, holders)
        if sharing is Sharing.OWN or (sharing is not Sharing.FIRST and any(copy != copies[0] for copy in copies)):
            wholes.add(together_with)
    return {key for key, copy in known.items() if copy.whole in wholes}


def _copies_of_subgroups(key: str, holders: Iterable[_Contribution]) -> list[Any]:
    """Returns what each process group has of an entry: the digests of all blocks, or the value."""
    copies: dict[int, Any] = {}
    for holder in holders:
        owner, offer = holder.owned[key].owner, holder.offers.get(key)
        if offer is None:
            copies.setdefault(owner, holder.values.get(key))
        else:
            copies[owner] = {**(copies.get(owner) or {}), **offer.by_box()}
    return list(copies.values())


def _check_names(apart: Collection[str], everyone: Sequence[_Contribution]) -> None:
    """Raises ``CheckpointError`` if an entry has the key under which one rank's own value of another is saved."""
    keys = {key for contribution in everyone for key in contribution.paths}
    for name in (key_of_rank(key, rank) for key in apart for rank in range(len(everyone))):
        if name in keys:
            raise CheckpointError(f"two entries have the key {name}: one so named, and a rank's of another. Rename one")


def _blocks(assignment: Assignment, contents: Contents, owned: Mapping[str, Owned]) -> list[BlockToWrite]:
    """Returns the assigned boxes with their data, as views of the contents."""
    blocks = []
    keys = {key_of_rank(key, copy.owner): key for key, copy in owned.items()}
    for name, box, offered in assignment.boxes:
        entry = contents.tensors[keys.get(name, name)]
        data = next(block.data for block in entry.blocks if block.box == offered)
        part = narrowed(data.detach(), within(box, offered))
        blocks.append(BlockToWrite(name, box, [part], box == whole(entry.shape)))
    return blocks


def write(
    storage: Storage,
    plan: SavePlan,
    rendezvous: Rendezvous,
    rank: int,
    register: Callable[[], None] = lambda: None,
) -> int:
    """Writes this rank's file; rank 0 commits when all ranks have written. Returns when the checkpoint exists.

    These are steps 2 to 5 of [Note: commit] in ``checkpoint/saving/commit.py``. Every rank must call it, but it runs no
    collectives, so it may run in a thread beside the training.

    Args:
        register: called on rank 0 before the checkpoint comes into existence; see ``commit``.

    Returns:
        The bytes of this rank's file, 0 where it has none.

    Raises:
        CheckpointError: on every rank, if any rank fails before the commit; then the checkpoint does not exist.
    """
    with only_checkpoint_errors(), rendezvous, giving_up_when(rendezvous.check), profiled("write"):
        objects = {} if plan.record is None else stock_values(plan.record)
        result = write_blocks(storage, plan.directory, rank, plan.blocks, objects, rendezvous.check)
        rendezvous.submit(result.to_json())
        if plan.record is None:
            rendezvous.wait_for_outcome()
        else:
            results = [WriteResult.from_json(data) for data in rendezvous.collect()]
            commit(storage, plan.directory, plan.record, results, register)
            rendezvous.announce("committed")
    return sum(result.files.values())
