"""Moves the gradients of parameters, wherever they lie, into flat buffers that are laid out as their bucket."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_asgd.layout import BucketLayout
from dist_asgd.pieces import Placement

# Zeros of fewer elements are kept: the gaps between parameters come in few sizes.
KEPT_ZEROS = 64


class Packer:
    """Flattens gradients into the memory order of their parameters.

    Args:
        like: a tensor of the bucket's dtype and device.
    """

    def __init__(self, layout: BucketLayout, placements: Sequence[Placement], like: Tensor) -> None:
        self._spans, self._placements, self._like = layout.spans, placements, like
        self._row_major = [placement.is_row_major for placement in placements]
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
        if all(part.ndim == 1 for part in parts):
            torch.cat(parts, out=out)
        else:
            torch._chunk_cat(parts, 0, 1, out=out.view(1, -1))  # flattens each, as FSDP2 does

    def flat(self, position: int, grad: Tensor) -> Tensor:
        """One gradient in its parameter's memory order, 1-D; a view where it already has that order."""
        return self._placements[position].flatten(grad.resolve_conj())

    def _movable(self, position: int, grad: Tensor) -> Tensor:
        """The gradient in a form that the operators of ``pack`` flatten into the parameter's memory order."""
        as_it_is = self._row_major[position] and grad.ndim and grad.is_contiguous() and not grad.is_conj()
        movable = grad if as_it_is else self.flat(position, grad)
        return movable if movable.dtype == self._like.dtype else movable.to(self._like.dtype)

    def _padding(self, numel: int) -> Tensor:
        zeros = self._zeros.get(numel)
        if zeros is None:
            zeros = self._like.new_zeros(numel)
            if numel < KEPT_ZEROS:
                self._zeros[numel] = zeros
        return zeros
