"""Arguments of an update kernel: lists of tensors with their addresses, and what a step does to them, of which kind."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dist_asgd.asgd.rounding import Rounding
from dist_asgd.asgd.schedule import AnyScalars, Hyperparameters


@dataclass(frozen=True, eq=False)  # compared by identity, as keys of a WeakKeyDictionary in kernels/gpu.py
class TensorList:
    """Parameters, or slices of parameters, that one call updates, wherever they lie in memory.

    Attributes:
        tensors: each 1-D and contiguous; all real, of one dtype and on one device.
        starts: for each tensor the index, in averages and masters, of its first element.
        addresses: the memory address of each tensor, in bytes.
        numels: the number of elements of each tensor.
        numel: the number of elements of all tensors together.
        pointers: where ``addresses``, ``starts`` and ``numels`` lie in memory, for code in C.
    """

    tensors: tuple[Tensor, ...]
    starts: array[int]
    addresses: array[int]
    numels: array[int]
    numel: int
    pointers: tuple[int, int, int]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], starts: Sequence[int] = (0,)) -> TensorList:
        """Makes the list from 1-D real or complex tensors.

        Args:
            tensors: at least one; complex tensors are listed as reals, of twice the length.
            starts: as the attribute, but counted in elements of ``tensors``.
        """
        real = tuple(map(as_real, tensors))
        factor = 2 if tensors[0].is_complex() else 1
        addresses = array("q", map(Tensor.data_ptr, real))
        numels = array("q", map(Tensor.numel, real))
        places = array("q", [factor * start for start in starts])
        pointers = (pointer_to(addresses), pointer_to(places), pointer_to(numels))
        return cls(real, places, addresses, numels, sum(numels), pointers)


class Gradients(NamedTuple):
    """The gradients of the tensors of a ``TensorList``, in its order. Every bucket makes one in a step."""

    tensors: Sequence[Tensor]  # contiguous, all of one dtype, each with as many elements as its parameter
    addresses: array[int]  # the memory address of each tensor, in bytes

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Gradients:
        """Reads the addresses of ``tensors``."""
        return cls(tensors, array("q", map(Tensor.data_ptr, tensors)))


class SliceStep(NamedTuple):
    """One step of tensors that share ``scalars``: all that it takes besides parameters and gradients.

    Every bucket makes one in a step. It is a tuple, because a frozen dataclass takes four times as long to make.
    Averages and masters are real, in compute_dtype, indexed by the ``starts`` of a ``TensorList``, updated in place.
    """

    averages: Sequence[Tensor]  # each 1-D; one for each of scalars.mus, none of which is 0
    master: Tensor | None  # 1-D; None for no master
    h: Hyperparameters
    scalars: AnyScalars
    rounding: Rounding  # its ``first`` is the number of the element at index 0 of averages and master


class UpdateKind(NamedTuple):
    """Real dtypes and options for which one form of the update is compiled and checked.

    It is a tuple, since every step makes some and looks them up.
    """

    param: torch.dtype
    grad: torch.dtype
    has_master: bool
    rounded: torch.dtype  # the dtype to which parameters are rounded (``Rounding.dtype``)
    stochastic: bool  # whether that rounding is stochastic (``Rounding.seed`` is not None)


def pointer_to(table: array[int] | array[float]) -> int:
    """Returns the memory address of the first element of ``table``, which must outlive the use of the address."""
    return table.buffer_info()[0]


def as_real(flat: Tensor) -> Tensor:
    """Returns the 1-D view of a 1-D complex tensor as pairs of reals (as in torch.optim), or a real tensor itself."""
    return torch.view_as_real(flat).view(-1) if flat.is_complex() else flat
