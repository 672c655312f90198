"""What a manifest says must fit together, or a small file could stand for much, or one place have two entries."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from typing import TypeAlias

SMALLEST, LARGEST = 2**12, 2**18  # bytes of a block that has a checksum of its own
FRAME = 2**20  # bytes at most of what is before and behind a payload

EntryPlace: TypeAlias = tuple[
    tuple[str | int, ...], int | None
]  # path of an entry, and its rank if ranks have their own


class Wrong(Exception):
    """What is wrong in a manifest."""


def check_lengths(head: int, tail: int, block: int) -> None:
    """What is read at once is small, whatever the size of the file."""
    if not (SMALLEST <= block <= LARGEST and block.bit_count() == 1):
        raise Wrong(f"an item has blocks of {block} bytes, expected a power of two from {SMALLEST} to {LARGEST}")
    if max(head, tail) > FRAME:
        raise Wrong(f"an item has {max(head, tail)} bytes beside its payload, expected at most {FRAME}")


def check_overlaps(items: Iterable[tuple[str, int, int]]) -> None:
    """A byte is in one item. ``items``: file, start, stop."""
    for (file, _, stop), (other, start, _) in itertools.pairwise(sorted(items)):
        if file == other and stop > start:
            raise Wrong(f"items overlap at byte {start} of {file}")


def check_paths(places: Collection[EntryPlace], keys: Collection[EntryPlace]) -> None:
    """For each rank, the entries make up one nested state: none is in the place of another, or in another one.

    Args:
        keys: the places of mappings' keys, in which other entries may be.
    """
    known = set(places)
    own = {path for path, rank in known if rank is not None}
    if len(known) < len(places) or any((path, None) in known for path in own):
        raise Wrong("two entries have the same path")
    for path, rank in known:
        for depth in range(1, len(path)):
            above = {(path[:depth], None), (path[:depth], rank)} & known
            if not above <= set(keys):
                raise Wrong(f"the entry at {list(path)} is in another one, at {list(path[:depth])}")
