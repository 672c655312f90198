"""Sums the weighted tensors of several sources part by part, in float64, and rounds each part once."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

import torch
from torch import Tensor

from dist_asgd.boxes import Box, cut, grouped, whole
from dist_asgd.checkpoint.errors import naming
from dist_asgd.checkpoint.export.formats import Exported
from dist_asgd.checkpoint.format.tensor_bytes import memory
from dist_asgd.checkpoint.format.torch_archive import payload_bytes
from dist_asgd.checkpoint.merging.payload import PayloadReader
from dist_asgd.checkpoint.merging.sources import WeightSource
from dist_asgd.checkpoint.merging.sums import LARGE, arithmetic

PART_BYTES = 3 * 2**20  # bytes of a source that are read at once
READS_AHEAD = 4  # sources of which a part is read while others are added
ADDED_AT_ONCE = 4  # sources of which parts are held until they are added together, while a part of the sum is in cache

AVERAGED = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    *(torch.complex128, torch.complex64, torch.complex32),
)

_Batch: TypeAlias = Sequence[tuple[int, Box]]  # (index of a wanted box, a part of it in the coordinates of the tensor)
_Task: TypeAlias = tuple[_Batch, int]  # a batch, and the number of the source of which it is read


class MeanSource:
    """Source of the weighted means of tensors, for writers of files. Each tensor may be taken once.

    Tensors whose dtype is not in ``AVERAGED`` are the last source's.

    Args:
        sources: which have equal names, shapes and dtypes.
        weights: one for each source; divided by their sum.
        from_last: names of further tensors that are the last source's; they are read from no other.
        report: called with numbers of bytes that have been read.

    Attributes:
        sources: as given.
        differing: names of tensors whose dtype is not in ``AVERAGED`` and that sources were found to have different.
    """

    def __init__(
        self,
        sources: Sequence[WeightSource],
        weights: Sequence[float],
        from_last: frozenset[str],
        report: Callable[[int], None],
    ) -> None:
        self.sources, self._weights, self._from_last, self._report = sources, weights, from_last, report
        self._readers = [PayloadReader(source.storage, source.tensors) for source in sources]
        self._is_large = bytes_to_read(sources, from_last) >= LARGE
        self._last = len(sources) - 1
        self.differing: set[str] = set()

    @property
    def tensors(self) -> list[Exported]:
        """The tensors of the mean, in the order of the last source."""
        last = self.sources[-1]
        return [Exported(name, name, tensor.saved.shape, last.dtypes[name]) for name, tensor in last.tensors.items()]

    def payloads(self, tensors: Sequence[Exported]) -> Iterator[tuple[int, memoryview]]:
        """Yields the means of all ``tensors`` in parts, tensor after tensor, in row-major order.

        Yields pairs of the index of a tensor in ``tensors`` and the bytes of its next part in the tensor's dtype.

        Raises:
            CheckpointError: elements could not be read or are damaged.
        """
        return self.boxes([(tensor, whole(tensor.shape)) for tensor in tensors])

    def boxes(self, wanted: Sequence[tuple[Exported, Box]]) -> Generator[tuple[int, memoryview], None, None]:
        """Yields the means of boxes of tensors in parts, as ``payloads`` does; the index is that of a box.

        The boxes of a tensor must follow one another in row-major order.
        """
        parts = (
            ((number, part), part.numel * tensor.dtype.itemsize)
            for number, (tensor, box) in enumerate(wanted)
            for part in cut(box, max(1, PART_BYTES // tensor.dtype.itemsize))
        )
        batches = grouped(parts, PART_BYTES)
        tasks = ((batch, number) for batch in batches for number in range(len(self._readers)))
        sums: list[_Sum] = []
        for (batch, number), found in self._read_ahead(wanted, tasks):
            if number == 0:
                sums = [self._sum(wanted[index][0]) for index, _ in batch]
            for one, part in zip(sums, found, strict=True):
                if part is not None:
                    one.add(part, self._weights[number])
                    self._report(part.nbytes)
            if number == self._last:
                yield from self._results(wanted, batch, sums)

    def _sum(self, tensor: Exported) -> _Sum:
        return _Sum(tensor.dtype, self.is_mean(tensor), self._is_large)

    def is_mean(self, tensor: Exported) -> bool:
        """Returns whether a tensor is averaged; else it is the last source's."""
        return tensor.dtype in AVERAGED and tensor.name not in self._from_last

    def _is_read(self, name: str, number: int) -> bool:
        return number == self._last or name not in self._from_last

    def _results(
        self, wanted: Sequence[tuple[Exported, Box]], batch: _Batch, sums: Sequence[_Sum]
    ) -> Iterator[tuple[int, memoryview]]:
        total = sum(self._weights)
        for (index, _), one in zip(batch, sums, strict=True):
            if one.is_differing:
                self.differing.add(wanted[index][0].name)
            yield index, memory(one.result(total))

    def _read_ahead(
        self, wanted: Sequence[tuple[Exported, Box]], tasks: Iterable[_Task]
    ) -> Iterator[tuple[_Task, list[Tensor | None]]]:
        """Yields each task with what was read, in order. A source has one read under way, so that it is read in order.

        In the list is, for each part of the batch, a tensor, or None where this source is not read.
        """
        pending: deque[tuple[_Task, Future[list[Tensor | None]]]] = deque()
        ahead = min(READS_AHEAD, len(self._readers))
        with ThreadPoolExecutor(ahead, thread_name_prefix="dist_asgd-merge") as pool:
            try:
                for task in tasks:
                    if len(pending) == ahead:
                        first, future = pending.popleft()
                        yield first, future.result()
                    pending.append((task, pool.submit(self._read, wanted, task)))
                while pending:
                    first, future = pending.popleft()
                    yield first, future.result()
            finally:
                for _, future in pending:
                    future.cancel()

    def _read(self, wanted: Sequence[tuple[Exported, Box]], task: _Task) -> list[Tensor | None]:
        batch, number = task
        chosen = [(wanted[index][0].key, part) for index, part in batch if self._is_read(wanted[index][0].name, number)]
        with naming(self.sources[number].url):
            found = iter(self._readers[number].read(chosen))
        return [next(found) if self._is_read(wanted[index][0].name, number) else None for index, _ in batch]


class _Sum:
    """The weighted sum of one part of a tensor over the sources, or the part of the last source.

    Args:
        dtype: of the result.
        is_mean: whether parts are added.
        is_large: whether the merge is large enough for compiled code.
    """

    def __init__(self, dtype: torch.dtype, is_mean: bool, is_large: bool) -> None:
        self._dtype, self._is_mean, self._is_large = dtype, is_mean, is_large
        self._sum: Tensor | None = None  # 1-D, float64, of ``_numbers``; None before parts are added
        self._waiting: list[tuple[Tensor, float]] = []  # ``_numbers`` of parts that are not added yet, their weights
        self._last: Tensor | None = None  # the part of the source that came last
        self.is_differing = False

    def add(self, part: Tensor, weight: float) -> None:
        """Takes the part of the next source: CPU, contiguous, of the source's dtype."""
        if not self._is_mean:
            self.is_differing |= self._last is not None and memory(self._last) != memory(part)
        elif weight:  # a weight of 0 ignores inf and NaN
            self._waiting.append((_numbers(part), weight))
            if len(self._waiting) == ADDED_AT_ONCE:
                self._add_waiting()
        self._last = part

    def _add_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for dtype, pairs in itertools.groupby(waiting, key=lambda pair: pair[0].dtype):
            values, weights = zip(*pairs, strict=True)
            is_first = self._sum is None
            if self._sum is None:
                self._sum = torch.empty(values[0].numel(), dtype=torch.float64, device="cpu")
            arithmetic(dtype, self._is_large).add(self._sum, values, weights, is_first)

    def result(self, total: float) -> Tensor:
        """Returns the sum divided by ``total``, or the part of the last source. Called once, after ``add``."""
        if self._last is None:
            raise ValueError("nothing was added")
        if not self._is_mean:
            return self._last
        self._add_waiting()
        if self._sum is None:
            raise ValueError("all weights are 0")
        mean = torch.empty(self._last.shape, dtype=self._dtype, device="cpu")
        arithmetic(_numbers(mean).dtype, self._is_large).finish(_numbers(mean), self._sum, total)
        return mean


def _numbers(tensor: Tensor) -> Tensor:
    """Returns a 1-D view of a contiguous tensor: its elements, or the real and imaginary parts of complex ones."""
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).view(-1)


def bytes_to_read(sources: Sequence[WeightSource], from_last: frozenset[str]) -> int:
    """Returns the number of bytes that a ``MeanSource`` reads for all tensors; its arguments are as given there."""
    return sum(
        payload_bytes(tensor.saved.dtype, tensor.saved.shape)
        for source in sources
        for name, tensor in source.tensors.items()
        if source is sources[-1] or name not in from_last
    )
