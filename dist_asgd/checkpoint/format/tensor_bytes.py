"""The bytes of tensors in row-major order, wherever the tensors lie, and the checksums of these bytes."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Iterator

from torch import Tensor

from dist_asgd.boxes import Box, cut, whole
from dist_asgd.checkpoint.format.manifest_rules import LARGEST, SMALLEST

COPY_BYTES = 8 * 2**20  # bytes that are copied at once from a device, or from memory that is not in order


BLOCKS = 512  # of an item that have a checksum of their own, if it is large enough


class Checksums:
    """CRC-32 of a payload up to the end of each block: with the one before it, a block can be checked by itself."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.last = 0  # of all so far
        self._done = 0  # bytes
        self._crcs: list[int] = []

    def add(self, data: memoryview) -> None:
        start = 0
        while start < len(data):
            stop = min(len(data), start + self.block - self._done % self.block)
            if self._done % self.block == 0:
                self._crcs.append(0)
            self._crcs[-1] = self.last = zlib.crc32(data[start:stop], self.last)
            self._done += stop - start
            start = stop

    def text(self) -> str:
        return "".join(f"{crc:08x}" for crc in self._crcs)


def block_bytes(size: int) -> int:
    """How many bytes of a payload of ``size`` have one checksum: a power of two."""
    wanted = max(1, -(-size // BLOCKS))
    return min(max(SMALLEST, 1 << (wanted - 1).bit_length()), LARGEST)


def memory_of(data: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor's elements in row-major order, some megabytes at a time, copied only where they must be."""
    data = data.detach()
    if data.device.type == "cpu" and data.is_contiguous() and not (data.is_conj() or data.is_neg()):
        everything = memory(data)
        yield from (everything[start : start + COPY_BYTES] for start in range(0, len(everything), COPY_BYTES))
        return
    box = whole(tuple(data.shape))
    for part in cut(box, max(1, COPY_BYTES // data.dtype.itemsize)) if box.numel else ():
        yield memory(narrowed(data, part).resolve_conj().resolve_neg().cpu().contiguous())


def narrowed(data: Tensor, box: Box) -> Tensor:
    """Returns the view of ``data``, of any number of dims, that holds the elements of ``box``."""
    for dim, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        data = data.narrow(dim, offset, size)
    return data


def memory(tensor: Tensor) -> memoryview:
    """Of a contiguous tensor on the CPU, which lives as long as the view does."""
    if not tensor.nbytes:
        return memoryview(b"")
    array = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    array.owner = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")
