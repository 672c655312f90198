"""Boxes of tensors: intersections, cuts, and where a box lies in a row-major payload."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


def whole(shape: Sequence[int]) -> Box:
    return Box((0,) * len(shape), tuple(shape))


def intersection(one: Box, other: Box) -> Box | None:
    """What both have; None where they have no element in common. Boxes without dims are the one element."""
    starts = tuple(map(max, one.offsets, other.offsets))
    stops = [min(a + m, b + n) for a, m, b, n in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)]
    sizes = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
    return Box(starts, sizes) if all(size > 0 for size in sizes) else None


def within(box: Box, outer: Box) -> Box:
    """``box`` in the coordinates of ``outer``."""
    return Box(tuple(mine - its for mine, its in zip(box.offsets, outer.offsets, strict=True)), box.sizes)


def cut(box: Box, most: int) -> Iterator[Box]:
    """The box in parts of at most ``most`` elements (> 0), in row-major order, each a range of one of its dims."""
    if box.numel <= most:
        yield box
        return
    dim = next(dim for dim, size in enumerate(box.sizes) if size > 1)  # those before it are 1
    below = math.prod(box.sizes[dim + 1 :])
    for part in _along(box, dim, max(1, most // below)):
        yield from cut(part, most)


def batches(tensors: Sequence[tuple[Sequence[int], int]], most: int) -> Iterator[list[tuple[int, Box]]]:
    """All elements of ``tensors`` (shape, bytes of an element), in order, in batches of at most ``most`` bytes.

    A batch has (number of the tensor, a box of it); of a tensor without elements an empty box.
    """
    batch: list[tuple[int, Box]] = []
    size = 0
    for number, (shape, itemsize) in enumerate(tensors):
        for box in cut(whole(shape), max(1, most // itemsize)):
            if batch and size + box.numel * itemsize > most:
                yield batch
                batch, size = [], 0
            batch.append((number, box))
            size += box.numel * itemsize
    yield batch


def share(box: Box, count: int) -> list[Box]:
    """The box in at most ``count`` parts that are as equal as cuts across one dim make them."""
    dim = next((dim for dim, size in enumerate(box.sizes) if size > 1), None)
    return [box] if dim is None or count < 2 else list(_along(box, dim, -(-box.sizes[dim] // count)))


def _along(box: Box, dim: int, step: int) -> Iterator[Box]:
    for start in range(0, box.sizes[dim], step):
        offsets, sizes = list(box.offsets), list(box.sizes)
        offsets[dim] += start
        sizes[dim] = min(step, box.sizes[dim] - start)
        yield Box(tuple(offsets), tuple(sizes))


def strides(sizes: Sequence[int]) -> tuple[int, ...]:
    """Of a row-major tensor, in elements."""
    return tuple(math.prod(sizes[dim + 1 :]) for dim in range(len(sizes)))


def extent(box: Box, sizes: Sequence[int]) -> tuple[int, int]:
    """``[start, stop)`` in elements: the shortest range of a row-major tensor of ``sizes`` that has the ``box``."""
    steps = strides(sizes)
    start = sum(offset * step for offset, step in zip(box.offsets, steps, strict=True))
    last = sum((size - 1) * step for size, step in zip(box.sizes, steps, strict=True))
    return start, start + last + 1


def cut_to_extents(box: Box, sizes: Sequence[int], most: int) -> Iterator[Box]:
    """The box, in a row-major tensor of ``sizes``, in parts whose extents are at most ``most`` elements, or one row's.

    Rows of a narrow box lie far apart: an extent that is cut holds less of what is between them.
    """
    start, stop = extent(box, sizes)
    dim = next((dim for dim, size in enumerate(box.sizes) if size > 1), None)
    if stop - start <= most or dim is None:
        yield box
        return
    for part in _along(box, dim, max(1, most // strides(sizes)[dim])):
        yield from cut_to_extents(part, sizes, most)


def tiles(boxes: Sequence[Box], shape: Sequence[int]) -> bool:
    """Whether the boxes lie in a tensor of ``shape``, each of its elements in exactly one of them."""
    for box in boxes:
        if len(box.offsets) != len(shape) or len(box.sizes) != len(shape):
            return False
        if any(o < 0 or n < 0 or o + n > size for o, n, size in zip(box.offsets, box.sizes, shape, strict=True)):
            return False
    return sum(box.numel for box in boxes) == math.prod(shape) and _disjoint([box for box in boxes if box.numel])


def _disjoint(boxes: list[Box]) -> bool:
    if len(boxes) < 2 or not boxes[0].sizes:
        return len(boxes) < 2
    boxes = sorted(boxes, key=lambda box: box.offsets)
    reaching: list[Box] = []  # those that reach into the row where the next one begins
    for box in boxes:
        reaching = [other for other in reaching if other.offsets[0] + other.sizes[0] > box.offsets[0]]
        if any(intersection(box, other) for other in reaching):
            return False
        reaching.append(box)
    return True


@dataclass(frozen=True, slots=True)
class Box:
    """A block of an N-d tensor whose elements are consecutive in row-major order."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


def boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Cuts the row-major flat range ``[start, stop)`` of a tensor of ``shape`` into at most 2N - 1 boxes, in order."""
    if start >= stop:
        return []
    if not shape:
        return [Box((), ())]
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last:
        return _in_row(shape, first, start - first * row, stop - first * row)
    result: list[Box] = []
    if start > first * row:
        result += _in_row(shape, first, start - first * row, row)
        first += 1
    whole_stop = stop // row
    if whole_stop > first:
        result.append(Box((first, *(0 for _ in shape[1:])), (whole_stop - first, *shape[1:])))
    if stop > whole_stop * row:
        result += _in_row(shape, whole_stop, 0, stop - whole_stop * row)
    return result


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> list[Box]:
    return [Box((row, *box.offsets), (1, *box.sizes)) for box in boxes(shape[1:], start, stop)]
