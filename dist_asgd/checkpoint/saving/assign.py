"""Assignment of the blocks of all tensors to the ranks that write them: each element is written by exactly one rank."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from dist_asgd.boxes import Box, cut, share, tiles
from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.saving.differences import Differences

MAX_ITEM_BYTES = 2**29  # an archive then needs no zip64 records, and large tensors are balanced over ranks
FIRST_RANK_BYTES = 2**16  # parts of at most this many bytes are written by the lowest rank that has them
ONE_WRITER_BYTES = 2**20  # blocks of at most this many bytes have one writer; larger ones are divided


@dataclass(frozen=True, slots=True)
class Offer:
    """The blocks that a rank has of one tensor."""

    shape: tuple[int, ...]  # of the whole tensor
    dtype: torch.dtype
    boxes: tuple[Box, ...]  # in the whole tensor
    digests: tuple[int, ...] = ()  # of each block; none if nobody compares them

    def by_box(self) -> dict[Box, int]:
        """Returns the digests by block."""
        return dict(zip(self.boxes, self.digests, strict=True)) if self.digests else {}


@dataclass(frozen=True, slots=True)
class Assignment:
    """The boxes that one rank writes."""

    boxes: list[tuple[str, Box, Box]] = field(default_factory=list)  # key, box to write, offered box that contains it


def assign(offers: Sequence[Mapping[str, Offer]], differences: Differences) -> list[Assignment]:
    """Returns by rank the boxes that it writes. Replicas of a block divide it among them. Not collective.

    A tensor without digests is not divided: ranks may have different ones, and the lowest rank's is written.

    Args:
        offers: by rank, then by key.
        differences: gets the tensors of which ranks offer a block with different digests.

    Raises:
        CheckpointError: ranks have different shapes or dtypes of a tensor, or their blocks do not make up the tensor.
    """
    assignments = [Assignment() for _ in offers]
    load = _BytesPerRank(len(offers))
    for key, by_rank in _by_key(offers).items():
        first = next(iter(by_rank.values()))
        holders = holders_of(key, first, by_rank)
        for box, ranks in holders.items():
            if len(ranks) > 1:
                if first.digests:
                    differences.compare(key, {rank: by_rank[rank].by_box().get(box) for rank in ranks})
                else:
                    ranks = ranks[:1]
            for part in _parts(box, len(ranks), first.dtype.itemsize):
                size = part.numel * first.dtype.itemsize
                rank = load.least(ranks) if size > FIRST_RANK_BYTES else ranks[0]
                load.add(rank, size)
                assignments[rank].boxes.append((key, part, box))
    return assignments


def _by_key(offers: Sequence[Mapping[str, Offer]]) -> dict[str, dict[int, Offer]]:
    keys: dict[str, dict[int, Offer]] = {}
    for rank, offered in enumerate(offers):
        for key, offer in offered.items():
            keys.setdefault(key, {})[rank] = offer
    return dict(sorted(keys.items()))


def holders_of(key: str, first: Offer, by_rank: Mapping[int, Offer]) -> dict[Box, list[int]]:
    """Returns for each block of the tensor ``key`` the ranks that have it, ascending.

    Args:
        first: the offer that the others are compared with.
        by_rank: the offers of all ranks that have a part of the tensor.

    Raises:
        CheckpointError: ranks have different shapes or dtypes, or the blocks do not make up the tensor.
    """
    holders: dict[Box, list[int]] = {}
    for rank, offer in by_rank.items():
        if (offer.shape, offer.dtype) != (first.shape, first.dtype):
            raise CheckpointError(
                f"ranks have different tensors as {key!r}: {_kind(first)} on rank {next(iter(by_rank))} and "
                f"{_kind(offer)} on rank {rank}"
            )
        for box in offer.boxes:
            if box.numel or not any(first.shape) or 0 in first.shape:
                holders.setdefault(box, []).append(rank)
    if 0 in first.shape:  # one empty block is written, so that the tensor is in the checkpoint
        return dict(list(holders.items())[:1])
    if not tiles(list(holders), first.shape):
        found = sum(box.numel for box in holders)
        raise CheckpointError(
            f"ranks {sorted(by_rank)} have {found} elements of {key!r}, in {len(holders)} blocks, which do not make up "
            f"{_kind(first)}: every rank that has a part of it must save it"
        )
    return holders


def _kind(offer: Offer) -> str:
    return f"{str(offer.dtype).removeprefix('torch.')} of shape {offer.shape}"


def _parts(box: Box, ranks: int, itemsize: int) -> list[Box]:
    count = min(ranks, -(-box.numel * itemsize // ONE_WRITER_BYTES))
    return [part for shared in share(box, count) for part in cut(shared, MAX_ITEM_BYTES // itemsize)]


class _BytesPerRank:
    """The bytes that each rank has been assigned so far."""

    def __init__(self, world_size: int) -> None:
        self._bytes = [0] * world_size
        self._heap = [(0, rank) for rank in range(world_size)]

    def add(self, rank: int, count: int) -> None:
        self._bytes[rank] += count

    def least(self, ranks: Sequence[int]) -> int:
        """Returns the one of ``ranks`` with the fewest bytes."""
        if len(ranks) < len(self._bytes):
            return min(ranks, key=self._bytes.__getitem__)
        while self._heap[0][0] != self._bytes[self._heap[0][1]]:  # the rank has got more since it was pushed
            heapq.heapreplace(self._heap, (self._bytes[self._heap[0][1]], self._heap[0][1]))
        return self._heap[0][1]
