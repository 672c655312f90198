"""Boxes, which are axis-aligned blocks of N-d tensors: how they intersect, are cut, and lie in row-major memory.

It is integer arithmetic only, without tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-aligned block of an N-d tensor.

    Attributes:
        offsets: the index of its first element in each dim.
        sizes: its number of elements along each dim.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements; 1 without dims."""
        return math.prod(self.sizes)


def whole(shape: Sequence[int]) -> Box:
    """Returns the box of all elements of a tensor of ``shape``."""
    return Box((0,) * len(shape), tuple(shape))


def intersection(one: Box, other: Box) -> Box | None:
    """Returns the box of the common elements, or None if there are none. Both boxes must have equally many dims."""
    starts = tuple(map(max, one.offsets, other.offsets))
    stops = [min(a + m, b + n) for a, m, b, n in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)]
    sizes = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
    return Box(starts, sizes) if all(size > 0 for size in sizes) else None


def within(box: Box, outer: Box) -> Box:
    """Returns ``box`` with offsets counted from those of ``outer``."""
    return Box(tuple(mine - its for mine, its in zip(box.offsets, outer.offsets, strict=True)), box.sizes)


def cut(box: Box, most: int) -> Iterator[Box]:
    """Cuts the box into parts of at most ``most`` > 0 elements and yields them in row-major order.

    The elements of each part are consecutive in the row-major order of the box.
    """
    if box.numel <= most:
        yield box
        return
    dim = next(dim for dim, size in enumerate(box.sizes) if size > 1)  # every dim before it has size 1
    below = math.prod(box.sizes[dim + 1 :])
    for part in _along(box, dim, max(1, most // below)):
        yield from cut(part, most)


def batches(tensors: Sequence[tuple[Sequence[int], int]], most: int) -> Iterator[list[tuple[int, Box]]]:
    """Yields all elements of several tensors, in order, in batches of at most ``most`` bytes.

    A batch is a list of (index of the tensor, box of that tensor). A tensor without elements gives one empty box. A
    batch has more bytes only if a single element has.

    Args:
        tensors: for each tensor its shape and the bytes of an element.
    """
    boxes_and_bytes = (
        ((number, box), box.numel * itemsize)
        for number, (shape, itemsize) in enumerate(tensors)
        for box in cut(whole(shape), max(1, most // itemsize))
    )
    return grouped(boxes_and_bytes, most)


def grouped(items: Iterable[tuple[T, int]], most: int) -> Iterator[list[T]]:
    """Yields items, in order, in groups of at most ``most`` bytes; a larger item has a group of its own.

    Without items it yields one empty group.

    Args:
        items: pairs of an item and its bytes.
    """
    group: list[T] = []
    size = 0
    for item, nbytes in items:
        if group and size + nbytes > most:
            yield group
            group, size = [], 0
        group.append(item)
        size += nbytes
    yield group


def share(box: Box, count: int) -> list[Box]:
    """Cuts the box along its first dim of size > 1 into at most ``count`` parts, all but the last equally large."""
    dim = next((dim for dim, size in enumerate(box.sizes) if size > 1), None)
    return [box] if dim is None or count < 2 else list(_along(box, dim, -(-box.sizes[dim] // count)))


def _along(box: Box, dim: int, step: int) -> Iterator[Box]:
    """Cuts the box along ``dim`` into parts of at most ``step`` indices."""
    for start in range(0, box.sizes[dim], step):
        offsets, sizes = list(box.offsets), list(box.sizes)
        offsets[dim] += start
        sizes[dim] = min(step, box.sizes[dim] - start)
        yield Box(tuple(offsets), tuple(sizes))


def strides(sizes: Sequence[int]) -> tuple[int, ...]:
    """Returns the strides, in elements, of a row-major tensor of ``sizes``."""
    return tuple(math.prod(sizes[dim + 1 :]) for dim in range(len(sizes)))


def extent(box: Box, sizes: Sequence[int]) -> tuple[int, int]:
    """Returns the shortest flat range ``[start, stop)`` of a row-major tensor of ``sizes`` that contains the ``box``.

    The box must have elements.
    """
    steps = strides(sizes)
    start = sum(offset * step for offset, step in zip(box.offsets, steps, strict=True))
    last = sum((size - 1) * step for size, step in zip(box.sizes, steps, strict=True))
    return start, start + last + 1


def cut_to_extents(box: Box, sizes: Sequence[int], most: int) -> Iterator[Box]:
    """Cuts the box of a row-major tensor of ``sizes`` until the extent of every part is at most ``most`` elements.

    The rows of a narrow box lie far apart, so the extents of its parts together hold fewer foreign elements than the
    extent of the box.
    """
    start, stop = extent(box, sizes)
    dim = next((dim for dim, size in enumerate(box.sizes) if size > 1), None)
    if stop - start <= most or dim is None:
        yield box
        return
    for part in _along(box, dim, max(1, most // strides(sizes)[dim])):
        yield from cut_to_extents(part, sizes, most)


def tiles(boxes: Sequence[Box], shape: Sequence[int]) -> bool:
    """Returns whether the boxes cover a tensor of ``shape``: each element once, and nothing outside."""
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
    reaching: list[Box] = []  # boxes that reach into the row where the next one begins
    for box in boxes:
        reaching = [other for other in reaching if other.offsets[0] + other.sizes[0] > box.offsets[0]]
        if any(intersection(box, other) for other in reaching):
            return False
        reaching.append(box)
    return True


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
