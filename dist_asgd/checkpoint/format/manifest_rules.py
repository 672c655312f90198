"""Checks that the statements of a manifest are consistent.

Without these checks, a small forged file could claim much memory, or two entries could claim one place in the state.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from typing import TypeAlias

MIN_CRC_BLOCK, MAX_CRC_BLOCK = 2**12, 2**18  # bytes of a payload that have a checksum of their own
MAX_FRAME = 2**20  # bytes of the head, and of the tail, of an item

# The path of an entry in the nested state, and the rank that had it, or None for an entry of every rank.
EntryPlace: TypeAlias = tuple[tuple[str | int, ...], int | None]


class FormatError(Exception):
    """Raised where a manifest contradicts itself or the format. The message says where."""


def check_lengths(head: int, tail: int, block: int) -> None:
    """Checks that the parts of an item that are read at once are small, whatever the size of the file."""
    if not (MIN_CRC_BLOCK <= block <= MAX_CRC_BLOCK and block.bit_count() == 1):
        expected = f"a power of two from {MIN_CRC_BLOCK} to {MAX_CRC_BLOCK}"
        raise FormatError(f"an item has blocks of {block} bytes, expected {expected}")
    if max(head, tail) > MAX_FRAME:
        raise FormatError(f"an item has {max(head, tail)} bytes beside its payload, expected at most {MAX_FRAME}")


def check_overlaps(items: Iterable[tuple[str, int, int]]) -> None:
    """Checks that no byte is in two items, which are given as (file, start, stop)."""
    for (file, _, stop), (other, start, _) in itertools.pairwise(sorted(items)):
        if file == other and stop > start:
            raise FormatError(f"items overlap at byte {start} of {file}")


def check_paths(places: Collection[EntryPlace], keys: Collection[EntryPlace]) -> None:
    """Checks that for each rank the entries make up one nested state: no two in one place, none inside another.

    Args:
        places: the places of all entries.
        keys: the places of entries that hold the keys of a mapping, whose members are entries inside that place.

    Raises:
        FormatError: two entries have one path, or an entry is inside another one.
    """
    known = set(places)
    own = {path for path, rank in known if rank is not None}
    if len(known) < len(places) or any((path, None) in known for path in own):
        raise FormatError("two entries have the same path")
    for path, rank in known:
        for depth in range(1, len(path)):
            above = {(path[:depth], None), (path[:depth], rank)} & known
            if not above <= set(keys):
                raise FormatError(f"the entry at {list(path)} is in another one, at {list(path[:depth])}")
