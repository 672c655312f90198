"""Moves parameters and gradients, wherever they lie, to and from flat buffers with the layout of their bucket."""

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
from dist_asgd.kernels.packing import FusedPacking
from dist_asgd.kernels.scan import are_plain
from dist_asgd.kernels.tensor_list import Gradients, TensorList, as_real
from dist_asgd.sharding.layout import PARAMETER_ALIGNMENT, BucketLayout, Piece
from dist_asgd.sharding.placement import Placement

# Parameters with fewer elements are gathered into a buffer before the update. One operator moves many of them, where
# updating each in its place would take several operators.
GATHER_BELOW = 32 * 1024

# Elements that are gathered into one buffer, for each thread. Buffers of this size stay in a core's cache and in the
# heap; malloc maps larger ones anew, page by page, each time.
GATHER_TOGETHER = 64 * 1024

# Tensors of fewer zeros are kept for reuse, because gaps between parameters come in few sizes.
KEPT_ZEROS = 64


@dataclass(frozen=True, slots=True)
class Batch:
    """Neighbouring pieces of a shard that are updated together.

    With ``parts`` one kernel updates any number of pieces in their places. Without, the batch is several small whole
    parameters, or one parameter, which may be large or cut.
    """

    pieces: tuple[Piece, ...]
    positions: tuple[int, ...]  # position of each piece's parameter in the bucket
    gaps: tuple[int, ...]  # elements between each piece and its predecessor
    sizes: tuple[int, ...]  # elements of each piece
    start: int  # first element of the batch in the shard
    stop: int  # end of the batch in the shard
    parts: TensorList | None = None  # the parameters' elements in the pieces, for one kernel

    @classmethod
    def of(cls, pieces: Sequence[Piece], view_of: Callable[[Piece], Tensor] | None = None) -> Batch:
        """Returns the batch of ``pieces``, with ``parts`` if ``view_of`` is given."""
        ends = [pieces[0].shard_start, *(piece.shard_stop for piece in pieces)]
        gaps = tuple(piece.shard_start - end for piece, end in zip(pieces, ends, strict=False))
        sizes = tuple(piece.stop - piece.start for piece in pieces)
        starts = [piece.shard_start - ends[0] for piece in pieces]
        parts = None if view_of is None else TensorList.of(list(map(view_of, pieces)), starts)
        positions = tuple(piece.position for piece in pieces)
        return cls(tuple(pieces), positions, gaps, sizes, pieces[0].shard_start, ends[-1], parts)

    @property
    def gathered(self) -> bool:
        """Whether the pieces are moved into one buffer for the update; a single piece is updated in its place."""
        return len(self.pieces) > 1


class Batches:
    """Divides the pieces of a shard into batches, and remembers the division from step to step.

    Args:
        owned: the pieces of the shard, in order.
        layout: the layout of the bucket.
        device: the device of the bucket.
        view_of: returns the parameter's elements in a piece, 1-D and contiguous, if one kernel updates all pieces;
            None if torch's operators do.
    """

    def __init__(
        self,
        owned: Sequence[Piece],
        layout: BucketLayout,
        device: torch.device,
        view_of: Callable[[Piece], Tensor] | None,
    ) -> None:
        self._owned, self._layout, self._device, self._view_of = owned, layout, device, view_of
        self._planned: dict[tuple[int, int], list[Batch]] = {}

    def clear(self) -> None:
        """Forgets the batches, because parameters have moved to other memory."""
        self._planned.clear()

    def of(self, first: int, stop: int) -> list[Batch]:
        """Returns the batches of the parameters at positions ``[first, stop)``."""
        if (first, stop) not in self._planned:
            if len(self._planned) > 2 * len(self._owned):  # more than cutting runs finer step by step makes
                self._planned.clear()
            self._planned[first, stop] = self._plan(first, stop)
        return self._planned[first, stop]

    def _plan(self, first: int, stop: int) -> list[Batch]:
        low, high = (bisect.bisect_left(self._owned, at, key=lambda piece: piece.position) for at in (first, stop))
        pieces = self._owned[low:high]
        if self._view_of is not None:
            return [Batch.of(pieces, self._view_of)] if pieces else []
        most, below = GATHER_TOGETHER * torch.get_num_threads(), GATHER_BELOW
        if self._device.type != "cpu":  # on a GPU an operator costs more than a copy
            most = below = self._layout.shard_numel
        batches: list[Batch] = []
        small: list[Piece] = []
        for piece in pieces:
            numel = piece.stop - piece.start
            is_small = numel == self._layout.spans[piece.position].numel and numel < below
            if small and (not is_small or small[-1].shard_stop - small[0].shard_start >= most):
                batches.append(Batch.of(small))
                small = []
            if is_small:
                small.append(piece)
            else:
                batches.append(Batch.of([piece]))
        return [*batches, Batch.of(small)] if small else batches


class Packer:
    """Flattens gradients into the memory order of their parameters, and joins them in flat buffers.

    Args:
        layout: the layout of the bucket.
        placements: this rank's blocks of the parameters.
        like: a tensor of the bucket's dtype and device.
    """

    def __init__(self, layout: BucketLayout, placements: Sequence[Placement], like: Tensor) -> None:
        self._spans, self._placements, self._like = layout.spans, placements, like
        self._sizes = tuple(span.numel for span in layout.spans)
        self._row_major = [placement.is_row_major for placement in placements]
        self._all_row_major = all(self._row_major)
        self._no_scalars = all(placement.shape for placement in placements)
        self._zeros: dict[int, Tensor] = {}

    def pack(self, positions: Sequence[int], grads: Sequence[Tensor | None], start: int, out: Tensor) -> None:
        """Writes the gradients of whole parameters to ``out`` (1-D), which has the bucket's elements from ``start`` on.

        Writes zeros for None and into gaps. One operator moves all gradients; a copy for each would take four times as
        long for small ones.
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

    def convert(self, grads: Sequence[Tensor | None], out: Tensor, fused: FusedPacking, parts: TensorList) -> None:
        """Does what ``pack`` does, by one kernel, with the gradients of all parameters of the bucket.

        Args:
            out: 1-D, the whole bucket in a dtype that ``fused`` converts to.
            parts: all parameters of the bucket, at their places in ``out``.
        """
        present = [grad for grad in grads if grad is not None]
        if len(present) < len(grads) or parts.numel < len(out):
            out.zero_()
        if not present:
            return
        if not self.are_ready(present):
            dtype, flat = self._like.dtype, self._plain
            grads = [None if grad is None else flat(at, grad).contiguous().to(dtype) for at, grad in enumerate(grads)]
        addresses = array("q", [0 if grad is None else grad.data_ptr() for grad in grads])
        fused(parts, Gradients([out if grad is None else grad for grad in grads], addresses), out)

    def readable(self, batch: Batch, grads: Sequence[Tensor]) -> Gradients:
        """Returns the gradients of a batch for one kernel: 1-D, in memory order, real, of the bucket's dtype or wider.

        Args:
            batch: the batch, with ``parts``.
            grads: the gradient of each parameter of the batch.
        """
        result, dtype = list(grads), self._like.dtype.to_real()
        if self.are_ready(result):
            for index in {0, len(result) - 1}:  # only the first and the last can be cut
                result[index] = self._readable(batch.pieces[index], result[index])
            return Gradients.of(result)
        result = list(map(self._readable, batch.pieces, grads))
        if any(grad.dtype != dtype for grad in result):
            result = [grad.to(compute_dtype(dtype)) for grad in result]
        return Gradients.of(result)

    def select(self, batch: Batch, plain: Gradients) -> Gradients:
        """Returns the gradients of a batch, as ``readable`` does, from ``plain``: the gradients of all parameters."""
        if batch.sizes == self._sizes:  # the pieces are all parameters, and whole
            return plain
        outer = {0, len(batch.pieces) - 1}  # the only pieces that can be cut
        cut = [index for index in outer if self._is_cut(batch.pieces[index])]
        tensors = [plain.tensors[position] for position in batch.positions]
        addresses = array("q", [plain.addresses[position] for position in batch.positions])
        for index in cut:
            tensors[index] = self._readable(batch.pieces[index], tensors[index])
            addresses[index] = tensors[index].data_ptr()
        return Gradients(tensors, addresses)

    def join(self, batch: Batch, tensors: list[Tensor], ready: bool = False) -> Tensor:
        """Returns the elements of a batch as one 1-D tensor: a copy for several pieces, a view where possible for one.

        Args:
            batch: the batch.
            tensors: one tensor for each parameter of the batch, of the shape of this rank's block.
            ready: whether the tensors are 1-D, contiguous and of the bucket's dtype.
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

    def split(self, batch: Batch, flat: Tensor, targets: Sequence[Tensor]) -> None:
        """Copies the elements of a batch from ``flat``, as ``join`` returns them, to the 1-D ``targets``."""
        sizes, out = batch.sizes, list(targets)
        if any(batch.gaps):
            pairs = zip(batch.gaps, targets, strict=True)
            out = [part for gap, own in pairs for part in ((self._ignored[gap], own) if gap else (own,))]
            sizes = tuple(size for pair in zip(batch.gaps, sizes, strict=True) for size in pair if size)
        torch.split_with_sizes_copy(flat, sizes, out=out)

    def flat(self, position: int, grad: Tensor) -> Tensor:
        """Returns one gradient 1-D in its parameter's memory order: a view where it has that order."""
        return self._placements[position].flatten(grad.resolve_conj().resolve_neg())

    def _readable(self, piece: Piece, grad: Tensor) -> Tensor:
        return as_real(self._plain(piece.position, grad)[piece.start : piece.stop])

    def _plain(self, position: int, grad: Tensor) -> Tensor:
        """Returns one gradient as ``flat`` does, in memory that holds its values."""
        if type(grad) is not Tensor:  # a subclass, as of asynchronous collectives, may have no memory of its own
            grad = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device).copy_(grad)
        return self.flat(position, grad)

    def are_ready(self, tensors: Sequence[Tensor]) -> bool:
        """Whether all tensors have the bucket's dtype, and memory in the order of their parameters.

        The tensors belong to some parameters of the bucket, or to all.
        """
        return self._all_row_major and are_plain(tensors, self._like)

    def _is_cut(self, piece: Piece) -> bool:
        return piece.stop - piece.start < self._spans[piece.position].numel

    def _movable(self, position: int, grad: Tensor) -> Tensor:
        """Returns the gradient in the bucket's dtype, such that ``_flattened`` moves it in memory order."""
        as_it_is = self._row_major[position] and grad.ndim and grad.is_contiguous() and not grad.is_conj()
        movable = grad if as_it_is else self.flat(position, grad)
        return movable if movable.dtype == self._like.dtype else movable.to(self._like.dtype)

    @functools.cached_property
    def _ignored(self) -> list[Tensor]:
        """Scratch tensors by number of elements, for the gaps between parameters in ``split``."""
        return [self._like.new_empty(gap) for gap in range(PARAMETER_ALIGNMENT)]

    def _padding(self, numel: int) -> Tensor:
        zeros = self._zeros.get(numel)
        if zeros is None:
            zeros = self._like.new_zeros(numel)
            if numel < KEPT_ZEROS:
                self._zeros[numel] = zeros
        return zeros


def _flattened(parts: list[Tensor], out: Tensor) -> Tensor:
    """Fills ``out`` (1-D) with the elements of ``parts`` one after the other, and returns it."""
    if all(part.ndim == 1 for part in parts):
        return torch.cat(parts, out=out)
    chunk_cat(parts, 0, 1, out=out.view(1, -1))
    return out
