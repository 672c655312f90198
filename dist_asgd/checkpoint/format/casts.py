"""Copies elements into tensors of another dtype, rounded once, to the nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_asgd.checkpoint.format.tensor_bytes import as_bits


def copy_rounded(target: Tensor, source: Tensor) -> None:
    """Copies ``source`` into ``target``, of one shape. Real or complex elements are rounded once, to the nearest.

    A NaN stays a NaN, and what is too large becomes infinite.
    """
    as_bits(target).copy_(as_bits(rounded(source, target.dtype)))


def rounded(source: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``source`` in ``dtype``, each element rounded once, to the nearest, ties to even."""
    if source.dtype == dtype:
        return source
    if source.dtype.is_complex and dtype.is_complex:
        return torch.view_as_complex(rounded(torch.view_as_real(source), dtype.to_real()).contiguous())
    is_twice = source.dtype == torch.float64 and dtype.is_floating_point and dtype.itemsize < 4
    return (_to_odd(source) if is_twice else source).to(dtype)


def _to_odd(source: Tensor) -> Tensor:
    """Returns fp64 ``source`` in fp32, rounded to odd: what lies between two neighbours becomes the odd one.

    PyTorch rounds fp64 to fp32 and then to fp16 or bf16, which is wrong where the first rounding makes a tie. From a
    number rounded to odd, which has two more bits than the result at least, the second rounding is right.
    """
    near = source.to(torch.float32)
    away = near.to(torch.float64).abs() > source.abs()
    bits = near.view(torch.int32)
    is_inexact = (near.to(torch.float64) != source) & ~source.isnan()
    odd = torch.where(is_inexact & (bits & 1 == 0), torch.where(away, bits - 1, bits + 1), bits)
    return odd.view(torch.float32)
