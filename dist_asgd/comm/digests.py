"""Digests of tensors, by which ranks compare what they hold without sending it.

[Note: digests] A digest is the sum of a tensor's words of at most 32 bits, weighted by powers of ``FACTOR``, modulo
2**64. It is made on the tensor's device from the bits, so NaNs and signed zeros count. ``FACTOR`` is 5 modulo 8. All of
its powers are odd, so one changed word always changes the sum. Powers less than 2**30 places apart differ modulo 2**32,
so two swapped words always change it. (In a sum of 64-bit words a word's top bit would weigh the same everywhere.)

A tensor of more than ``BLOCK`` words of 64 bits is folded into one block first, which takes less time: for each further
block, the words so far are multiplied by ``FACTOR``, the next words are added, and upper halves are mixed into lower
ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dist_asgd.boxes import boxes

FACTOR = 0x5851F42D4C957F2D
BLOCK = 2**18  # words of 64 bits: much for one call on a GPU, and few enough for the caches of a CPU
SMALL = 2**13  # bytes up to which tensors are summed up together
TOGETHER = 256  # small tensors that are summed up together

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32, 16: torch.int32}  # by bytes of an element


def digests(tensors: Sequence[Tensor]) -> list[int]:
    """Returns a digest of each tensor, which fits into int64.

    Equal dtypes, shapes and bits have equal digests, whatever the strides and the device. Reads each tensor once.

    Args:
        tensors: plain and dense, of any dtypes, shapes, strides and devices.
    """
    found = [0] * len(tensors)
    large: dict[torch.device, list[int]] = {}
    small: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for number, tensor in enumerate(tensors):
        if tensor.nbytes > SMALL:
            large.setdefault(tensor.device, []).append(number)
        else:
            small.setdefault((tensor.dtype, tensor.device), []).append(number)
    batches = [(numbers, _large_digests) for numbers in large.values()]
    for numbers in small.values():
        batches += [(numbers[at : at + TOGETHER], _small_digests) for at in range(0, len(numbers), TOGETHER)]
    for numbers, digests_of in batches:
        for number, digest in zip(numbers, digests_of([tensors[n].detach() for n in numbers]).tolist(), strict=True):
            found[number] = digest
    return found


def _large_digests(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the digests, 1-D and int64, of tensors of one device."""
    powers = torch.full((2 * BLOCK,), FACTOR, device="cpu").cumprod(0)
    # The lower half of a word w is w - 2**32 (w >> 32); its sum with the upper half, weighted, has these weights.
    weights = powers[::2].to(tensors[0].device), (powers[1::2] - (powers[::2] << 32)).to(tensors[0].device)
    return torch.stack([_weighted_sum(_folded(tensor), *weights) for tensor in tensors])


def _weighted_sum(words: Tensor, weights: Tensor, upper_weights: Tensor) -> Tensor:
    """Returns the 0-dim sum of ``words`` (1-D, int64, at most ``BLOCK``) and of their upper halves, both weighted."""
    return _dot(words, weights[: len(words)]) + _dot(words >> 32, upper_weights[: len(words)])


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Returns the 0-dim sum of products, modulo 2**64; ``torch.dot`` takes integers on the CPU only."""
    return torch.dot(one, other) if one.device.type == "cpu" else (one * other).sum()


def _folded(tensor: Tensor) -> Tensor:
    """Returns the bits of ``tensor`` folded into at most ``BLOCK`` words: 1-D, int64."""
    blocks = _blocks(tensor)
    first = next(blocks)
    if tensor.nbytes <= BLOCK * 8:
        return first
    words = first.clone()
    upper = torch.empty_like(words)
    for block in blocks:
        part, upper_part = words[: len(block)], upper[: len(block)]  # the last block may be shorter
        torch.bitwise_right_shift(part, 32, out=upper_part)
        torch.add(block, part, alpha=FACTOR, out=part).bitwise_xor_(upper_part)
    return words


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Yields the elements in row-major order in blocks of ``BLOCK`` words (1-D, int64), zeros behind the last one."""
    size = tensor.element_size()
    if size < 8:
        tensor = tensor.view(_INTEGERS[size])  # torch cannot fill tensors of some dtypes, such as float4
    step = BLOCK * 8 // size
    for start in range(0, tensor.numel(), step):
        elements = _elements(tensor, start, min(start + step, tensor.numel()))
        if elements.nbytes % 8 or elements.storage_offset() * size % 8:
            padded = elements.new_zeros(-(-elements.nbytes // 8) * 8 // size)
            padded[: len(elements)] = elements
            elements = padded
        yield elements.view(torch.int64)


def _elements(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Returns elements ``[start, stop)`` in row-major order, 1-D: a view where the tensor is contiguous."""
    if tensor.is_contiguous():
        return tensor.view(-1)[start:stop]
    parts = []
    for box in boxes(tensor.shape, start, stop):
        part = tensor
        for dim, (offset, length) in enumerate(zip(box.offsets, box.sizes, strict=True)):
            part = part.narrow(dim, offset, length)
        parts.append(part.reshape(-1))
    return torch.cat(parts)


def _small_digests(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the digests, 1-D and int64, of tensors of one dtype and device."""
    integers = _INTEGERS[tensors[0].element_size()]
    flats = [tensor.reshape(-1).view(integers) for tensor in tensors]
    sizes = list(map(len, flats))
    powers = torch.full((max(sizes),), FACTOR, device="cpu").cumprod(0).to(tensors[0].device)
    weighted = torch.cat(flats).long().mul_(torch.cat([powers[:size] for size in sizes]))
    ends = torch.tensor([0, *sizes], device="cpu").cumsum(0).to(weighted.device)
    return torch.cat([weighted.new_zeros(1), weighted.cumsum(0)])[ends].diff()
