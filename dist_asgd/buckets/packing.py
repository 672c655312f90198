"""Moves the gradients of parameters, wherever they lie, into flat buffers that are laid out as their bucket."""

from __future__ import annotations

import bisect
import functools
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_asgd._torch_private import chunk_cat
from dist_asgd.asgd.rounding import compute_dtype
from dist_asgd.kernels.scan import are_plain
from dist_asgd.kernels.tensor_list import Gradients, TensorList, as_real
from dist_asgd.sharding.layout import PARAMETER_ALIGNMENT, BucketLayout, Piece
from dist_asgd.sharding.placement import Placement

# What has fewer elements is gathered before the update: one operator moves all of it, where reading each where it lies
# would cost several operators a parameter.
GATHER_BELOW = 32 * 1024

# So many elements are gathered together, for each thread: the buffers stay in a core's cache, and in the heap (malloc
# maps larger ones anew, page by page, each time).
GATHER_TOGETHER = 64 * 1024

# Zeros of fewer elements are kept: the gaps between parameters come in few sizes.
KEPT_ZEROS = 64


@dataclass(frozen=True, slots=True)
class Batch:
    """Neighbours in a shard that are updated together.

    Where there are no ``parts``: small whole parameters, or one, which may be large or cut.
    """

    pieces: tuple[Piece, ...]
    positions: tuple[int, ...]  # of the pieces, as their ``gaps`` and ``sizes``
    gaps: tuple[int, ...]  # elements between each and its predecessor
    sizes: tuple[int, ...]
    parts: TensorList | None = None  # the pieces of the parameters, if they are updated in one pass wherever they lie

    @classmethod
    def of(cls, pieces: Sequence[Piece], own: Callable[[Piece], Tensor] | None = None) -> Batch:
        ends = [pieces[0].shard_start, *(piece.shard_stop for piece in pieces)]
        gaps = tuple(piece.shard_start - end for piece, end in zip(pieces, ends, strict=False))
        sizes = tuple(piece.stop - piece.start for piece in pieces)
        starts = [piece.shard_start - ends[0] for piece in pieces]
        parts = None if own is None else TensorList.of(list(map(own, pieces)), starts)
        return cls(tuple(pieces), tuple(piece.position for piece in pieces), gaps, sizes, parts)

    @property
    def gathered(self) -> bool:
        """Whether it is moved together for the update; what is alone is read where it lies."""
        return len(self.pieces) > 1

    @property
    def start(self) -> int:
        """In the shard."""
        return self.pieces[0].shard_start

    @property
    def stop(self) -> int:
        return self.pieces[-1].shard_stop


class Batches:
    """The batches of the pieces of a shard, ``owned``, of a bucket on ``device``.

    Args:
        own: gives a piece's part of the parameters, 1-D and contiguous, where they are updated in one pass wherever
            they lie; None: by PyTorch's operators.
    """

    def __init__(
        self,
        owned: Sequence[Piece],
        layout: BucketLayout,
        device: torch.device,
        own: Callable[[Piece], Tensor] | None,
    ) -> None:
        self._owned, self._layout, self._device, self._own = owned, layout, device, own
        self._planned: dict[tuple[int, int], list[Batch]] = {}

    def forget(self) -> None:
        """Parameters lie elsewhere now."""
        self._planned.clear()

    def of(self, first: int, stop: int) -> list[Batch]:
        """For the parameters ``[first, stop)``; from one step to the next, these mostly are the same."""
        if (first, stop) not in self._planned:
            if len(self._planned) > 2 * len(self._owned):  # more than there are ways to cut runs ever finer
                self._planned.clear()
            self._planned[first, stop] = self._plan(first, stop)
        return self._planned[first, stop]

    def _plan(self, first: int, stop: int) -> list[Batch]:
        if self._own is not None:
            pieces = [piece for piece in self._owned if first <= piece.position < stop]
            return [Batch.of(pieces, self._own)] if pieces else []
        most, below = GATHER_TOGETHER * torch.get_num_threads(), GATHER_BELOW
        if self._device.type != "cpu":  # a GPU minds operators more than copies
            most = below = self._layout.shard_numel
        batches: list[Batch] = []
        small: list[Piece] = []

        def close() -> None:
            if small:
                batches.append(Batch.of(small))
                small.clear()

        for index in range(bisect.bisect_left(self._owned, first, key=lambda piece: piece.position), len(self._owned)):
            piece = self._owned[index]
            if piece.position >= stop:
                break
            numel = piece.stop - piece.start
            if numel == self._layout.spans[piece.position].numel and numel < below:
                small.append(piece)
                if piece.shard_stop - small[0].shard_start >= most:
                    close()
            else:
                close()
                batches.append(Batch.of([piece]))
        close()
        return batches


class Packer:
    """Flattens gradients into the memory order of their parameters.

    Args:
        like: a tensor of the bucket's dtype and device.
    """

    def __init__(self, layout: BucketLayout, placements: Sequence[Placement], like: Tensor) -> None:
        self._spans, self._placements, self._like = layout.spans, placements, like
        self._row_major = [placement.is_row_major for placement in placements]
        self._all_row_major = all(self._row_major)
        self._no_scalars = all(placement.shape for placement in placements)
        self._zeros: dict[int, Tensor] = {}

    def pack(self, positions: Sequence[int], grads: Sequence[Tensor | None], start: int, out: Tensor) -> None:
        """Writes the gradients of whole parameters to ``out`` (1-D), which is the bucket from ``start`` on.

        None stands for zeros, and zeros fill the gaps. One operator moves them all: a copy for each would take four
        times as long for small ones.
        """
        parts: list[Tensor] = []
        end = start
        for position, grad in zip(positions, grads, strict=True):
            span = self._spans[position]
            if grad is None or span.start == span.stop:
                continue
            if span.start > end:
                parts.append(self._padding(span.start - end))
            parts.append(self._movable(position, grad))
            end = span.stop
        if start + len(out) > end:
            parts.append(self._padding(start + len(out) - end))
        _flattened(parts, out)

    def readable(self, batch: Batch, grads: Sequence[Tensor]) -> Gradients:
        """What belongs to a batch: contiguous, in memory order, real, and of one dtype, the bucket's or wider."""
        result, dtype = list(grads), self._like.dtype.to_real()
        if self.are_ready(result):
            for index in {0, len(result) - 1}:  # no other can be cut
                result[index] = self._readable(batch.pieces[index], result[index])
            return Gradients.of(result)
        result = list(map(self._readable, batch.pieces, grads))
        if any(grad.dtype != dtype for grad in result):
            result = [grad.to(compute_dtype(dtype)) for grad in result]
        return Gradients.of(result)

    def chosen(self, batch: Batch, plain: Gradients) -> Gradients:
        """The same from the gradients of all parameters, which lie as these do."""
        cut = {index for index in (0, len(batch.pieces) - 1) if self._is_cut(batch.pieces[index])}  # no other can be
        if not cut and len(batch.pieces) == len(plain.tensors):
            return plain
        tensors = [plain.tensors[position] for position in batch.positions]
        addresses = array("q", [plain.addresses[position] for position in batch.positions])
        for index in cut:
            tensors[index] = self._readable(batch.pieces[index], tensors[index])
            addresses[index] = tensors[index].data_ptr()
        return Gradients(tensors, addresses)

    def join(self, batch: Batch, tensors: list[Tensor], ready: bool = False) -> Tensor:
        """What belongs to a batch, one of ``tensors`` for each of its parameters, as 1-D; a copy if it is gathered.

        Args:
            ready: they are 1-D, contiguous and of the bucket's dtype.
        """
        if not batch.gathered:
            piece = batch.pieces[0]
            return self.flat(piece.position, tensors[0])[piece.start : piece.stop]
        if ready and not any(batch.gaps):
            return torch.cat(tensors)
        parts = tensors
        if not (ready or (self._no_scalars and self.are_ready(tensors))):
            parts = list(map(self._movable, batch.positions, tensors))
        if any(batch.gaps):
            pairs = zip(batch.gaps, parts, strict=True)
            parts = [part for gap, own in pairs for part in ((self._padding(gap), own) if gap else (own,))]
        return _flattened(parts, self._like.new_empty(batch.stop - batch.start))

    def part(self, batch: Batch, flat: Tensor, targets: Sequence[Tensor]) -> None:
        """The way back: fills the 1-D ``targets`` from what ``join`` made."""
        sizes, out = batch.sizes, list(targets)
        if any(batch.gaps):
            pairs = zip(batch.gaps, targets, strict=True)
            out = [part for gap, own in pairs for part in ((self._ignored[gap], own) if gap else (own,))]
            sizes = tuple(size for pair in zip(batch.gaps, sizes, strict=True) for size in pair if size)
        torch.split_with_sizes_copy(flat, sizes, out=out)

    def flat(self, position: int, grad: Tensor) -> Tensor:
        """One gradient in its parameter's memory order, 1-D; a view where it already has that order."""
        return self._placements[position].flatten(grad.resolve_conj().resolve_neg())

    def _readable(self, piece: Piece, grad: Tensor) -> Tensor:
        if type(grad) is not Tensor:  # it may have no memory of its own, as one of an asynchronous collective
            grad = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device).copy_(grad)
        return as_real(self.flat(piece.position, grad)[piece.start : piece.stop])

    def are_ready(self, tensors: Sequence[Tensor]) -> bool:
        """Whether their memory is what they show, in the memory order of their parameters; of all or some of those."""
        return self._all_row_major and are_plain(tensors, self._like)

    def _is_cut(self, piece: Piece) -> bool:
        return piece.stop - piece.start < self._spans[piece.position].numel

    def _movable(self, position: int, grad: Tensor) -> Tensor:
        """The gradient in a form that the operators of ``pack`` flatten into the parameter's memory order."""
        as_it_is = self._row_major[position] and grad.ndim and grad.is_contiguous() and not grad.is_conj()
        movable = grad if as_it_is else self.flat(position, grad)
        return movable if movable.dtype == self._like.dtype else movable.to(self._like.dtype)

    @functools.cached_property
    def _ignored(self) -> list[Tensor]:
        """By size, where ``part`` puts what lies between parameters."""
        return [self._like.new_empty(gap) for gap in range(PARAMETER_ALIGNMENT)]

    def _padding(self, numel: int) -> Tensor:
        zeros = self._zeros.get(numel)
        if zeros is None:
            zeros = self._like.new_zeros(numel)
            if numel < KEPT_ZEROS:
                self._zeros[numel] = zeros
        return zeros


def _flattened(parts: list[Tensor], out: Tensor) -> Tensor:
    """``out``, 1-D, filled with the elements of the ``parts`` one after the other."""
    if all(part.ndim == 1 for part in parts):
        return torch.cat(parts, out=out)
    chunk_cat(parts, 0, 1, out=out.view(1, -1))  # flattens each, as FSDP2 does
    return out
