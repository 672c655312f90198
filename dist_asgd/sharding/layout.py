"""Layouts of buckets as pure integers: which parameter lies where, and which rank owns which part.

[Note: words]
- *bucket*: a contiguous 1-D buffer of parameters of one group, device and dtype, of a multiple of
  ``world_size * UNIT`` elements.
- *span*: the range ``[start, stop)`` of one parameter in its bucket.
- *shard*: the equal part of a bucket that one rank owns.
- *piece*: span ∩ shard, the part of a parameter that a rank owns.
- *box*: an axis-aligned block of a parameter's own shape. A flat range of an N-d tensor is at most 2N - 1 boxes.
All offsets and sizes count elements.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

# Shards start on multiples of UNIT elements. torch's CPU kernels for bf16 and fp16 round full blocks of 32 elements and
# the tail differently, so a cut elsewhere would make results depend on the number of ranks.
UNIT = 32


# Parameters start on multiples of as many elements: 16 bytes in bf16, which vector loads, TMA and the fast cuBLAS
# kernels need.
PARAMETER_ALIGNMENT = 8


# Default bytes of a bucket. Where the host carries out the collectives (gloo), small buckets overlap better with
# backward and keep less memory. Elsewhere (NCCL) the host has to start the work of one bucket before the device has
# done that of the bucket before it, which takes a device less time the more ranks there are.
HOST_BUCKET_BYTES, DEVICE_BUCKET_BYTES = 25 * 2**20, 64 * 2**20


@dataclass(frozen=True, slots=True)
class Span:
    """The range ``[start, stop)`` of one parameter in its bucket, in elements."""

    index: int  # position of the parameter in the ``numels`` given to plan_buckets
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of one parameter that lies in one shard, in elements."""

    position: int  # index of the parameter's span in BucketLayout.spans
    start: int  # first element in the parameter, flattened in memory order
    stop: int  # end in the flattened parameter
    shard_start: int  # first element in the shard

    @property
    def shard_stop(self) -> int:
        return self.shard_start + self.stop - self.start


@dataclass(frozen=True, slots=True)
class BucketLayout:
    """Spans of the parameters of one bucket, and its division into equal shards, one for each rank."""

    spans: tuple[Span, ...]  # by increasing start, without overlaps
    numel: int  # elements with padding; a multiple of world_size * UNIT
    world_size: int

    @property
    def shard_numel(self) -> int:
        return self.numel // self.world_size

    def shard(self, rank: int) -> tuple[int, int]:
        """Returns start and stop of the shard of ``rank`` in the bucket."""
        return rank * self.shard_numel, (rank + 1) * self.shard_numel

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """Returns the pieces that ``rank`` owns: one for each parameter with elements in its shard, in order."""
        start, stop = self.shard(rank)
        first = bisect.bisect_right(self.spans, start, key=lambda span: span.stop)
        last = bisect.bisect_left(self.spans, stop, key=lambda span: span.start)
        pieces = []
        for position, span in enumerate(self.spans[first:last], first):
            low, high = max(span.start, start), min(span.stop, stop)
            if low < high:
                pieces.append(Piece(position, low - span.start, high - span.start, low - start))
        return tuple(pieces)


def plan_buckets(numels: Sequence[int], *, world_size: int, max_numel: int) -> tuple[BucketLayout, ...]:
    """Returns layouts that pack parameters of ``numels`` elements into buckets of about ``max_numel`` elements.

    Parameters are taken in reverse order of registration. Backward makes the gradients in about this order, so the
    gradients of the first bucket are complete first. A bucket is closed before a parameter that would take it over
    ``max_numel``; a parameter of more elements gets a bucket of its own.
    """
    buckets: list[BucketLayout] = []
    spans: list[Span] = []
    end = 0
    for index in reversed(range(len(numels))):
        start = _round_up(end, PARAMETER_ALIGNMENT)
        if spans and start + numels[index] > max_numel:
            buckets.append(_close(spans, end, world_size))
            spans, start = [], 0
        end = start + numels[index]
        spans.append(Span(index, start, end))
    if spans:
        buckets.append(_close(spans, end, world_size))
    return tuple(buckets)


def _close(spans: list[Span], end: int, world_size: int) -> BucketLayout:
    return BucketLayout(tuple(spans), _round_up(end, world_size * UNIT), world_size)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
