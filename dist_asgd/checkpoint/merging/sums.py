"""Arithmetic of weighted means: sums in float64 that are rounded once, by PyTorch's operators or by compiled code.

The compiled code (checkpoint/merging/sums.c) reads and writes each element once. It has the bits of the operators.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_asgd.c_library import DTYPES, SAME_BITS, compile_library, warn_once

SLICE = 2**15  # elements that operators convert and add at once: they stay in cache, and torch starts no threads
NOTHING = -0.0  # a sum of nothing: adding -0 to it gives -0, and 0 gives 0
WIDE: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
LARGE = 2**30  # bytes of all sources, from which on compiled code saves more time than its compiling takes
CHECKED = 5003  # elements on which compiled code is compared with the operators


class Arithmetic(Protocol):
    """Sums values of one floating dtype. All tensors are 1-D and contiguous, on the CPU; sums are float64."""

    def add(self, total: Tensor, parts: Sequence[Tensor], weights: Sequence[float], is_first: bool) -> None:
        """Adds each part times its weight to ``total``, one part after the other, each sum rounded once.

        ``is_first`` says that ``total`` has no values yet.
        """

    def finish(self, mean: Tensor, total: Tensor, divisor: float) -> None:
        """Writes ``total / divisor`` to ``mean``, whose dtype is that of the values. May change ``total``."""


class Operators:
    """Arithmetic by PyTorch's operators, on slices that stay in cache."""

    def add(self, total: Tensor, parts: Sequence[Tensor], weights: Sequence[float], is_first: bool) -> None:
        wide = torch.empty(min(SLICE, total.numel()), dtype=torch.float64, device="cpu")
        for start in range(0, total.numel(), SLICE):
            slice_ = total[start : start + SLICE]
            if is_first:
                slice_.fill_(NOTHING)
            for part, weight in zip(parts, weights, strict=True):
                slice_.add_(wide[: slice_.numel()].copy_(part[start : start + SLICE]), alpha=weight)

    def finish(self, mean: Tensor, total: Tensor, divisor: float) -> None:
        for part, slice_ in zip(total.split(SLICE), mean.split(SLICE), strict=True):
            slice_.copy_(rounded(part.div_(divisor), mean.dtype))


class Compiled:
    """Arithmetic by compiled code, for one dtype.

    Args:
        library: checkpoint/merging/sums.c, compiled for this dtype.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._add, self._finish = library.add, library.finish
        address, count = ctypes.c_void_p, ctypes.c_int64
        self._add.argtypes = [address, count, address, address, count, count]
        self._finish.argtypes = [address, address, count, ctypes.c_double]
        self._add.restype = self._finish.restype = None

    def add(self, total: Tensor, parts: Sequence[Tensor], weights: Sequence[float], is_first: bool) -> None:
        addresses, factors = array("q", map(Tensor.data_ptr, parts)), array("d", weights)
        tables = addresses.buffer_info()[0], factors.buffer_info()[0]
        self._add(total.data_ptr(), total.numel(), *tables, len(parts), is_first)

    def finish(self, mean: Tensor, total: Tensor, divisor: float) -> None:
        self._finish(mean.data_ptr(), total.data_ptr(), mean.numel(), divisor)


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``values`` (float64) rounded once to the nearest numbers of a floating dtype, ties to even.

    PyTorch converts to dtypes of 16 bits by way of float32, which rounds twice: a value just above the middle of two
    bfloat16 may become the middle in float32, and then the lower one. Here float32 gets, of its two numbers around a
    value, the one with an odd last bit, which is never such a middle.
    """
    if dtype in (torch.float64, torch.float32):
        return values.to(dtype)
    near = values.to(torch.float32)
    is_even = (near.view(torch.int32) & 1) == 0
    beyond = torch.where(near < values, torch.inf, -torch.inf).to(torch.float32)
    odd = torch.where(is_even & (near != values), torch.nextafter(near, beyond), near)
    return odd.to(dtype)


def arithmetic(dtype: torch.dtype, is_large: bool) -> Arithmetic:
    """Returns the arithmetic for values of a dtype, real or complex; the compiled one where the merge ``is_large``."""
    return (compiled(dtype.to_real()) if is_large else None) or Operators()


@functools.cache
def compiled(dtype: torch.dtype) -> Compiled | None:
    """Returns the compiled arithmetic of a dtype, or None if it cannot be had or has other bits than the operators.

    The first call with a dtype runs the C compiler; a message is logged, or a warning if it fails.
    """
    flags = [*SAME_BITS, f"-DVALUE={DTYPES[dtype]}"]
    library = compile_library(Path(__file__).with_name("sums.c"), flags, f"means of {dtype} in one pass over memory")
    if library is None:
        return None
    found = Compiled(library)
    if not has_bits_of_operators(found, dtype):
        warn_once(f"the compiled mean of {dtype} differs from PyTorch's operators on this CPU")
        return None
    return found


def has_bits_of_operators(arithmetic: Arithmetic, dtype: torch.dtype) -> bool:
    """Returns whether sums and means of some values have the bits of ``Operators``, where they are numbers."""
    generator = torch.Generator().manual_seed(0)
    size = torch.logspace(-50, 50, CHECKED, **WIDE)  # from zero to infinity, in dtypes of 16 bits
    parts = [torch.randn(CHECKED, generator=generator, **WIDE).mul(size).to(dtype) for _ in range(3)]
    found = []
    for one in (arithmetic, Operators()):
        total, mean = torch.empty(CHECKED, **WIDE), torch.empty(CHECKED, dtype=dtype, device="cpu")
        one.add(total, parts[:2], [0.3, 0.7], True)
        one.add(total, parts[2:], [-1.1], False)
        found.append(total.clone())
        one.finish(mean, total, -0.1)
        found.append(mean)
    return all(torch.allclose(a, b, 0, 0, equal_nan=True) for a, b in zip(found[:2], found[2:], strict=True))
