"""Digests of tensors: the same bits in any layout have the same digest, and every change is noticed."""

import math

import pytest
import torch

from dist_asgd.comm.digests import BLOCK, digests

SIZES = [1, 3, 1000, 2**13, 2 * BLOCK + 6, 4 * BLOCK + 12]  # summed up together, at once, folded


def digest(tensor):
    return digests([tensor])[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_changes_and_swaps_are_noticed(dtype, size):
    tensor = (torch.arange(size) % 200).to(dtype)
    found = {digest(tensor)}
    changes = [(0, size - 1), (0, 1), (size // 2, size - 1), (1, size - 2)] if size > 2 else []
    for one, other in changes:
        swapped = tensor.clone()
        swapped[[one, other]] = swapped[[other, one]]
        if swapped[one] != tensor[one]:
            assert digest(swapped) not in found
            found.add(digest(swapped))
    for place in {0, size // 2, size - 1}:
        changed = tensor.clone()
        changed[place] += 1
        assert digest(changed) not in found
    if dtype.is_floating_point:
        ones = torch.ones(size, dtype=dtype)
        assert digest(-ones) != digest(ones)  # only the sign bits differ, and there may be an even number of them
        ones[0] = -1
        assert size == 1 or digest(ones) != digest(ones.flip(0))
        zeros = torch.zeros(size, dtype=dtype)
        assert digest(-zeros) != digest(zeros)
        nans = torch.full((size,), math.nan, dtype=dtype)
        assert digest(nans) == digest(nans.clone())


def test_strides_and_neighbours_do_not_matter():
    raw = torch.randint(0, 256, (90, 7001), dtype=torch.uint8)
    for kind in (torch.bits8, torch.float4_e2m1fn_x2):  # which torch cannot fill, nor always transpose
        assert digest(raw.view(kind)) == digest(raw) and digest(raw.t().view(kind)) == digest(raw.t())
    kinds = [torch.float64, torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.complex128, torch.int64]
    shapes = [(), (0,), (3, 0), (5,), (40, 30), (600, 1001)]
    tensors = [(torch.rand(shape) * 100).to(dtype) for shape in shapes for dtype in kinds]
    expected = digests(tensors)
    assert expected == [digest(tensor) for tensor in tensors]
    for tensor, known in zip(tensors, expected, strict=True):
        if tensor.ndim == 2:
            assert digest(tensor.t().contiguous().t()) == known
        padded = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        padded[1:] = tensor.reshape(-1)
        assert digest(padded[1:].view(tensor.shape)) == known  # not at an even address


def test_it_is_the_weighted_sum_that_the_note_tells_of():
    words = torch.randint(-(2**31), 2**31, (5000,)).to(torch.int32)
    factor, total = 0x5851F42D4C957F2D, 0
    for place, word in enumerate(words.tolist(), start=1):
        is_lower = place % 2 == 1  # the lower half of a word of 64 bits counts without a sign
        total += (word % 2**32 if is_lower else word) * pow(factor, place, 2**64)
    assert digest(words) % 2**64 == total % 2**64
