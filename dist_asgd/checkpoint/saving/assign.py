"""Who writes what: ranks offer the blocks they have, and each element goes to exactly one of those that offer it."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dist_asgd.boxes import Box, cut, share, tiles
from dist_asgd.checkpoint.errors import CheckpointError

LARGEST = 2**29  # bytes of one item: archives need no 64-bit forms, and a file's items are balanced
OF_FIRST = 2**16  # bytes of a replicated block that the first rank writes: buffers of modules may differ between ranks
ONE_WRITER = 2**20  # bytes of a replicated block that one rank writes; of larger ones, each writes a part


@dataclass(frozen=True, slots=True)
class Offer:
    """What a rank has of one tensor."""

    shape: tuple[int, ...]  # of the whole
    dtype: torch.dtype
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class Share:
    """What a rank writes."""

    boxes: list[tuple[str, Box, Box]] = field(default_factory=list)  # key, the part to write, the offered box it is in


def assign(offers: Sequence[Mapping[str, Offer]]) -> list[Share]:
    """By rank, what each writes. Every element is written once, by a rank that has it; replicas take parts of a block.

    Raises:
        CheckpointError: ranks do not agree on a tensor, or have not all of it.
    """
    shares = [Share() for _ in offers]
    loads = _Loads(len(offers))
    for key, by_rank in _by_key(offers).items():
        first = next(iter(by_rank.values()))
        holders = holders_of(key, first, by_rank)
        for box, ranks in holders.items():
            for part in _parts(box, len(ranks), first.dtype.itemsize):
                rank = loads.least(ranks) if part.numel * first.dtype.itemsize > OF_FIRST else ranks[0]
                loads.add(rank, part.numel * first.dtype.itemsize)
                shares[rank].boxes.append((key, part, box))
    return shares


def _by_key(offers: Sequence[Mapping[str, Offer]]) -> dict[str, dict[int, Offer]]:
    keys: dict[str, dict[int, Offer]] = {}
    for rank, offered in enumerate(offers):
        for key, offer in offered.items():
            keys.setdefault(key, {})[rank] = offer
    return dict(sorted(keys.items()))


def holders_of(key: str, first: Offer, by_rank: Mapping[int, Offer]) -> dict[Box, list[int]]:
    """Which ranks have each block of the tensor ``key``, as ``first`` is one. Raises as ``assign``."""
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
    if 0 in first.shape:  # nothing to write, but it is written that there is nothing
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
    count = min(ranks, -(-box.numel * itemsize // ONE_WRITER))
    return [part for shared in share(box, count) for part in cut(shared, LARGEST // itemsize)]


class _Loads:
    """How much each rank has to write so far."""

    def __init__(self, world_size: int) -> None:
        self._bytes = [0] * world_size
        self._heap = [(0, rank) for rank in range(world_size)]

    def add(self, rank: int, count: int) -> None:
        self._bytes[rank] += count

    def least(self, ranks: Sequence[int]) -> int:
        """That of ``ranks`` which has least."""
        if len(ranks) < len(self._bytes):
            return min(ranks, key=self._bytes.__getitem__)
        while self._heap[0][0] != self._bytes[self._heap[0][1]]:  # it has got more since it was put there
            heapq.heapreplace(self._heap, (self._bytes[self._heap[0][1]], self._heap[0][1]))
        return self._heap[0][1]


def varying_keys(everyone: Sequence[Mapping[str, Any]]) -> set[str]:
    """The keys whose facts are not the same on all ranks, or that some ranks do not have."""
    keys = {key for facts in everyone for key in facts}
    return {key for key in keys if any(facts.get(key, _ABSENT) != everyone[0].get(key, _ABSENT) for facts in everyone)}


_ABSENT = object()
