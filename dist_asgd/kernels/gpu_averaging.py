"""Moves averages towards parameters on a GPU: one launch of a Triton kernel for any number of tensors and averages."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dist_asgd.kernels.gpu import (
    DTYPES,
    OPTIONS,
    SMALL,
    address_of,
    coded,
    double,
    double_bits,
    jit,
    launch_of,
    load,
    move_block,
    place_of_block,
    pointers_to,
    tl,
    triton,
    triton_dtype,
)
from dist_asgd.kernels.pointer_tables import DeviceTables
from dist_asgd.kernels.tensor_list import TensorList


@jit()
def _move_all(
    param_address: tl.tensor, averages: tl.tuple, mus: tl.tuple, place: tl.tensor, left: tl.tensor, first: tl.tensor,
    PARAM: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
) -> None:  # fmt: skip
    """Moves ``BLOCK`` elements of all averages from index ``first`` on, counted from ``place``."""
    iterate = load(pointers_to(param_address, first, PARAM, BLOCK, ALIGNED), left - first, BLOCK, ALIGNED).to(REAL)
    for k in tl.static_range(len(averages)):
        mu = double(mus[k].to(tl.int64) >> 1)
        move_block(address_of(averages[k], place, REAL), iterate, mu, left, first, REAL, "asks", BLOCK, ALIGNED)


@jit(("numel", "start"), ("param",))
def averaging_kernel(
    param: tl.tensor, averages: tl.tuple, mus: tl.tuple, numel: tl.int64, start: tl.int64,
    PARAM: tl.constexpr, REAL: tl.constexpr, MANY: tl.constexpr, BLOCK: tl.constexpr, SMALL: tl.constexpr,
) -> None:  # fmt: skip
    """Moves all averages of the block of this program.

    Args:
        param: the parameter; with MANY, the table ``DeviceTables.of_parts``.
        averages, mus: the ``coded`` addresses of averages, and the ``coded`` bits of the mu of each.
        numel: the number of elements of the parameter; with MANY, the number of parameters.
        start: the index of the parameter in the averages; ignored with MANY.
    """
    _, _, param_address, place, left = place_of_block(param, numel, start, PARAM, MANY, BLOCK)
    addresses = param_address
    for k in tl.static_range(len(averages)):
        addresses |= address_of(averages[k], place, REAL)
    if (left >= BLOCK) & (addresses & 15 == 0):
        _move_all(param_address, averages, mus, place, left, 0, PARAM, REAL, BLOCK, True)
    else:
        for first in range(0, tl.minimum(left, BLOCK).to(tl.int32), SMALL):
            _move_all(param_address, averages, mus, place, left, first, PARAM, REAL, SMALL, False)


class TritonAveraging:
    """Moves averages towards parameters in one launch. See ``move_averages_`` in kernels/averaging.py.

    Args:
        param, average: real dtypes of parameters and averages.
    """

    def __init__(self, param: torch.dtype, average: torch.dtype) -> None:
        self._types = {"PARAM": triton_dtype(param), "REAL": triton_dtype(average)}
        self._tables: WeakKeyDictionary[TensorList, DeviceTables] = WeakKeyDictionary()

    def __call__(self, parts: TensorList, averages: Sequence[Tensor], mus: Sequence[float]) -> None:
        addresses = coded(map(Tensor.data_ptr, averages))
        with torch.cuda.device_of(parts.tensors[0]):
            where, programs = launch_of(parts, self._tables)
            averaging_kernel[(programs,)](
                **where, averages=addresses, mus=coded(double_bits(*mus)), **self._types, SMALL=SMALL, **OPTIONS
            )


@functools.cache
def triton_averaging(param: torch.dtype, average: torch.dtype) -> TritonAveraging | None:
    """Returns the pass for these dtypes, or None if Triton is not installed or has no such pass.

    The arguments are those of ``TritonAveraging``. Compiling happens at the first launch.
    """
    if triton is None or param not in DTYPES or average not in (torch.float32, torch.float64):
        return None
    return TritonAveraging(param, average) if torch.promote_types(param, average) == average else None
