"""Where everything lies, as pure integers: no tensors, no process groups.

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

# Shards start on multiples of this. torch's CPU kernels for bf16 and fp16 round the elements of full 32-element
# blocks and those of the tail differently, so a cut elsewhere would make results depend on the number of ranks.
UNIT = 32


# Parameters start on multiples of this: 16 bytes in bf16, which vector loads, TMA and the fast cuBLAS kernels need.
PARAMETER_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Span:
    index: int  # of the parameter, in the order that was given to plan_buckets
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of one parameter that lies in one shard."""

    position: int  # of the span in BucketLayout.spans
    start: int  # in the flattened parameter
    stop: int
    shard_start: int  # in the shard

    @property
    def shard_stop(self) -> int:
        return self.shard_start + self.stop - self.start


@dataclass(frozen=True, slots=True)
class BucketLayout:
    spans: tuple[Span, ...]  # by increasing start, never overlapping
    numel: int  # with padding; a multiple of world_size * UNIT
    world_size: int

    @property
    def shard_numel(self) -> int:
        return self.numel // self.world_size

    def shard(self, rank: int) -> tuple[int, int]:
        """``[start, stop)`` of the rank's shard in the bucket."""
        return rank * self.shard_numel, (rank + 1) * self.shard_numel

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """What the rank owns, one entry for each parameter that has at least one element in its shard."""
        start, stop = self.shard(rank)
        first = bisect.bisect_right(self.spans, start, key=lambda span: span.stop)
        pieces = []
        for position in range(first, len(self.spans)):
            span = self.spans[position]
            if span.start >= stop:
                break
            low, high = max(span.start, start), min(span.stop, stop)
            if low < high:
                pieces.append(Piece(position, low - span.start, high - span.start, low - start))
        return tuple(pieces)


def plan_buckets(numels: Sequence[int], *, world_size: int, max_numel: int) -> tuple[BucketLayout, ...]:
    """Packs parameters of ``numels`` elements into buckets of about ``max_numel`` elements, in reverse order.

    Reverse registration order is about the order in which backward makes the gradients, so the first bucket is the
    first that can be reduced. A bucket is closed before the parameter that would take it over ``max_numel``; a
    parameter larger than that has a bucket of its own.
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
