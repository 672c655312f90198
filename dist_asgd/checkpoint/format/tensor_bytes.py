"""Gives the bytes of live tensors, and makes the checksums of payloads block by block."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor

from dist_asgd.boxes import Box, cut, whole
from dist_asgd.checkpoint.format.crc32 import crc32
from dist_asgd.checkpoint.format.manifest_rules import MAX_CRC_BLOCK, MIN_CRC_BLOCK

COPY_BYTES = 8 * 2**20  # bytes that are copied at once from a device, or from a tensor that is not contiguous
CRC_BLOCKS = 512  # checksums of an item, where the limits of a block's size allow it


class Checksums:
    """Makes the checksums of one payload: for each block, the CRC-32 of the payload from its start to the block's end.

    With the checksum of the block before it, a block can be verified by itself.

    Attributes:
        block: bytes of a block; the last one may be shorter.
        last: CRC-32 of all bytes so far.
    """

    def __init__(self, block: int) -> None:
        self.block = block
        self.last = 0
        self._done = 0  # bytes so far
        self._crcs: list[int] = []

    def add(self, data: memoryview) -> None:
        """Adds the next bytes of the payload."""
        start = 0
        while start < len(data):
            stop = min(len(data), start + self.block - self._done % self.block)
            if self._done % self.block == 0:
                self._crcs.append(0)
            self._crcs[-1] = self.last = crc32(data[start:stop], self.last)
            self._done += stop - start
            start = stop

    def text(self) -> str:
        """Returns the checksums for a manifest, 8 hexadecimal digits for each block."""
        return "".join(f"{crc:08x}" for crc in self._crcs)


def block_bytes(size: int) -> int:
    """Returns how many bytes of a payload of ``size`` bytes have one checksum: a power of two."""
    wanted = max(1, -(-size // CRC_BLOCKS))
    return min(max(MIN_CRC_BLOCK, 1 << (wanted - 1).bit_length()), MAX_CRC_BLOCK)


def memory_of(data: Tensor) -> Iterator[memoryview]:
    """Yields the bytes of a tensor's elements in row-major order, at most ``COPY_BYTES`` at a time.

    The tensor may be on any device and have any strides and dtype. The bytes of a contiguous CPU tensor are not copied.
    """
    data = as_bits(data.detach())
    if data.device.type == "cpu" and data.is_contiguous() and not (data.is_conj() or data.is_neg()):
        everything = memory(data)
        yield from (everything[start : start + COPY_BYTES] for start in range(0, len(everything), COPY_BYTES))
        return
    box = whole(tuple(data.shape))
    for part in cut(box, max(1, COPY_BYTES // data.dtype.itemsize)) if box.numel else ():
        yield memory(narrowed(data, part).resolve_conj().resolve_neg().cpu().contiguous())


def as_bits(data: Tensor) -> Tensor:
    """Returns ``data`` to be copied: a view as uint8 where an element is a byte, because torch transposes no float4."""
    return data.view(torch.uint8) if data.dtype.itemsize == 1 else data


def narrowed(data: Tensor, box: Box) -> Tensor:
    """Returns the view of ``data``, of any number of dims, that holds the elements of ``box``."""
    return data[tuple(slice(offset, offset + size) for offset, size in zip(box.offsets, box.sizes, strict=True))]


def elements_of(data: bytes, dtype: torch.dtype) -> Tensor:
    """Returns bytes as the elements of a 1-D CPU tensor, which must not be written to: it is no copy if it is aligned.

    The tensor keeps ``data`` alive.
    """
    address = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value
    if not data or not address or address % dtype.itemsize:
        return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype, device="cpu")
    array = (ctypes.c_char * len(data)).from_address(address)
    array.owner = data  # type: ignore[attr-defined]
    return torch.frombuffer(array, dtype=dtype)


def memory(tensor: Tensor) -> memoryview:
    """Returns the memory of a contiguous CPU tensor as writable bytes. The view keeps the tensor alive."""
    if not tensor.nbytes:
        return memoryview(b"")
    array = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    array.owner = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")
