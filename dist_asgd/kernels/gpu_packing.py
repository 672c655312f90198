"""Packs gradients into the flat buffer in which they are sent, in another dtype: one launch of a Triton kernel."""

from __future__ import annotations

import functools
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dist_asgd.kernels.gpu import (
    OPTIONS,
    SMALL,
    jit,
    launch_of,
    load,
    place_of_block,
    pointers_to,
    store,
    tl,
    triton,
    triton_dtype,
)
from dist_asgd.kernels.pointer_tables import DeviceTables
from dist_asgd.kernels.tensor_list import Gradients, TensorList

DTYPES = {torch.float32, torch.bfloat16, torch.float16}


@jit()
def _pack_block(
    grad_address: tl.tensor, out_address: tl.tensor, left: tl.tensor, first: tl.tensor,
    GRAD: tl.constexpr, WIRE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
) -> None:  # fmt: skip
    """Copies ``BLOCK`` elements from index ``first`` on. From index 0 to the end of the gradient there are ``left``."""
    values = load(pointers_to(grad_address, first, GRAD, BLOCK, ALIGNED), left - first, BLOCK, ALIGNED)
    store(pointers_to(out_address, first, WIRE, BLOCK, ALIGNED), values.to(WIRE), left - first, BLOCK, ALIGNED)


@jit(("numel", "start"), ("param", "grad", "out"))
def packing_kernel(
    param: tl.tensor, grad: tl.tensor, out: tl.tensor, numel: tl.int64, start: tl.int64,
    GRAD: tl.constexpr, WIRE: tl.constexpr, MANY: tl.constexpr, BLOCK: tl.constexpr, SMALL: tl.constexpr,
) -> None:  # fmt: skip
    """Packs the block of this program, unless its gradient is missing.

    Args:
        param: the parameter; with MANY, the table ``DeviceTables.of_parts``. Values of parameters are not read.
        grad: the gradient; with MANY, the table of the gradients' addresses, 0 where one is missing.
        out: the buffer.
        numel: the number of elements of the parameter; with MANY, the number of parameters.
        start: the index of the parameter in the buffer; ignored with MANY.
    """
    part, of_part, _, place, left = place_of_block(param, numel, start, GRAD, MANY, BLOCK)
    source = tl.load(grad + part) if MANY else grad.to(tl.int64)
    if source != 0:
        source += of_part * (GRAD.primitive_bitwidth // 8)
        target = out.to(tl.int64) + place * (WIRE.primitive_bitwidth // 8)
        if (left >= BLOCK) & ((source | target) & 15 == 0):
            _pack_block(source, target, left, 0, GRAD, WIRE, BLOCK, True)
        else:
            for first in range(0, tl.minimum(left, BLOCK).to(tl.int32), SMALL):
                _pack_block(source, target, left, first, GRAD, WIRE, SMALL, False)


class TritonPacking:
    """Packs gradients in one launch. See ``FusedPacking`` in kernels/packing.py.

    Args:
        grad, wire: the dtypes of gradients and of the buffer.
    """

    def __init__(self, grad: torch.dtype, wire: torch.dtype) -> None:
        self._types = {"GRAD": triton_dtype(grad), "WIRE": triton_dtype(wire)}
        self._tables: WeakKeyDictionary[TensorList, DeviceTables] = WeakKeyDictionary()

    def __call__(self, parts: TensorList, grads: Gradients, out: Tensor) -> None:
        with torch.cuda.device_of(out):
            where, programs = launch_of(parts, self._tables)
            gradient = self._tables[parts].of_grads(grads.addresses) if where["MANY"] else grads.tensors[0]
            if programs:
                packing_kernel[(programs,)](**where, grad=gradient, out=out, **self._types, SMALL=SMALL, **OPTIONS)


@functools.cache
def triton_packing(grad: torch.dtype, wire: torch.dtype) -> TritonPacking | None:
    """Returns the packing of these dtypes, or None if Triton is not installed or has no such packing.

    The arguments are those of ``TritonPacking``. Compiling happens at the first launch.
    """
    return None if triton is None or not {grad, wire} <= DTYPES else TritonPacking(grad, wire)
