"""Digest of a tensor's bits, made where the tensor lies, by which ranks find out whether they hold equal values."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_BLOCK = 2**16  # words of 8 bytes; a CPU's cache holds a block, its weights and their products
_BLOCKS_AT_ONCE = 32  # blocks that a device other than the CPU reads in one launch


@torch.no_grad()
def digest(tensor: Tensor) -> Tensor:
    """Returns a number that depends on every bit of ``tensor`` and on its position: 0-dim, int64, on its device.

    Two tensors of one shape and dtype that differ in one word of 8 bytes have different digests; if they differ in
    more, they have equal ones by an accident of 1 in 2**64. Strides and the device play no part. 0.0 and -0.0 differ.
    Reads the tensor once, in blocks, and does not wait for the device.

    Args:
        tensor: dense, of any dtype and shape. One that is not contiguous is copied first.
    """
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)
    if not flat.numel():
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    blocks = 1 if flat.device.type == "cpu" else _BLOCKS_AT_ONCE
    sums = [_block_sums(part) for part in flat.split(blocks * _BLOCK * 8 // flat.element_size())]
    of_blocks = torch.cat(sums) if len(sums) > 1 else sums[0]
    return (of_blocks * _weights(len(of_blocks), 1, flat.device)).sum()


def _block_sums(part: Tensor) -> Tensor:
    """Returns the weighted sum of the words of each block of ``part`` (1-D): 1-D, int64, modulo 2**64."""
    words = _words(part)
    weights = _weights(_BLOCK, 0, part.device)
    whole = len(words) // _BLOCK * _BLOCK
    sums = [(words[:whole].view(-1, _BLOCK) * weights).sum(dim=1)] if whole else []
    if whole < len(words):
        sums.append((words[whole:] * weights[: len(words) - whole]).sum(dim=0, keepdim=True))
    return torch.cat(sums) if len(sums) > 1 else sums[0]


def _words(part: Tensor) -> Tensor:
    """Returns the bits of ``part`` (1-D) as int64, filled up with zeros."""
    missing = -part.numel() * part.element_size() % 8
    if missing:
        part = torch.nn.functional.pad(part.view(torch.uint8), (0, missing))
    elif part.storage_offset() * part.element_size() % 8:  # int64 must be aligned
        part = part.clone()
    return part.view(torch.int64)


@functools.cache
def _weights(count: int, kind: int, device: torch.device) -> Tensor:
    """Returns odd numbers that look random, so that no position's bits are lost: 1-D, int64, on ``device``."""
    numbers = torch.arange(1 + kind, count + 1 + kind, dtype=torch.int64, device=device) * (0x9E3779B97F4A7C15 - 2**64)
    mixed = (numbers ^ (numbers >> 31)) * (0xBF58476D1CE4E5B9 - 2**64)
    return mixed ^ (mixed >> 27) | 1
