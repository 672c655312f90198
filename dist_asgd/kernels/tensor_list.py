"""Parts of parameters that one call updates, wherever they lie in memory."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)  # compared by identity: what is derived from them is kept beside them
class TensorList:
    """Each is 1-D and contiguous; all are real, of one dtype and device.

    Attributes:
        tensors: the parts.
        starts: where each lies in the averages and masters of all, in elements.
        addresses, numels: of ``tensors``.
        numel: of all together.
    """

    tensors: tuple[Tensor, ...]
    starts: array[int]
    addresses: array[int]
    numels: array[int]
    numel: int

    @classmethod
    def of(cls, tensors: Sequence[Tensor], starts: Sequence[int] = (0,)) -> TensorList:
        """Of real or complex ones; ``starts`` in their elements."""
        real = tuple(map(as_real, tensors))
        factor = 2 if tensors[0].is_complex() else 1
        addresses = array("q", map(Tensor.data_ptr, real))
        numels = array("q", map(Tensor.numel, real))
        return cls(real, array("q", [factor * start for start in starts]), addresses, numels, sum(numels))


@dataclass(frozen=True, eq=False, slots=True)
class Gradients:
    """Of parts: contiguous, each of as many elements, all of one dtype."""

    tensors: Sequence[Tensor]
    addresses: array[int]  # of the tensors

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Gradients:
        return cls(tensors, array("q", map(Tensor.data_ptr, tensors)))


def as_real(flat: Tensor) -> Tensor:
    """Complex numbers are pairs of reals to the rule, as in torch.optim."""
    return torch.view_as_real(flat).view(-1) if flat.is_complex() else flat
