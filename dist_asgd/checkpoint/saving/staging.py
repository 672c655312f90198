"""Copies of blocks in the memory of the host, so that training may change its tensors while a save writes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dist_asgd.boxes import cut, whole
from dist_asgd.checkpoint.format.tensor_bytes import as_bits, narrowed
from dist_asgd.checkpoint.saving.writer import BlockToWrite
from dist_asgd.comm.profiling import profiled

# Bytes of memory that are allocated at once. PyTorch rounds pinned memory up to a power of two, so that one allocation
# for everything could take twice its bytes.
CHUNK_BYTES = 2**26
PIECE_BYTES = 2**22  # bytes that are copied at once; a chunk has less than a piece of unused memory at its end
ALIGNMENT = 64  # bytes


class StagingMemory:
    """Memory on the host for the blocks that a rank writes. Each save uses it anew, and it grows where it must."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []  # 1-D, uint8, on the CPU; pinned if blocks were on a GPU

    def stage(self, blocks: Sequence[BlockToWrite]) -> list[BlockToWrite]:
        """Copies the blocks; their tensors may change when this returns. What was staged before is overwritten.

        Waits for the copies only, on the stream of each device that is current there.
        """
        with profiled("stage"):
            return self._stage(blocks)

    def _stage(self, blocks: Sequence[BlockToWrite]) -> list[BlockToWrite]:
        devices = {part.device for block in blocks for part in block.parts if is_asynchronous(part.device)}
        room = _Room(self._chunks, pinned=bool(devices))
        staged = [replace(block, parts=[c for part in block.parts for c in _copies(part, room)]) for block in blocks]
        for device in devices:
            wait_for(device)
        return staged

    def free(self) -> None:
        """Gives the memory back."""
        self._chunks.clear()


class _Room:
    """Hands out memory of chunks from the first one on, and adds chunks to them at the end."""

    def __init__(self, chunks: list[Tensor], pinned: bool) -> None:
        self._chunks, self._pinned = chunks, pinned
        self._number = 0  # of the chunk in use
        self._used = 0  # bytes of it

    def take(self, size: int) -> Tensor:
        """Returns ``size`` bytes, at most ``CHUNK_BYTES``: 1-D, uint8, aligned for every dtype."""
        if self._used + size > CHUNK_BYTES:
            self._number, self._used = self._number + 1, 0
        if self._number == len(self._chunks):
            self._chunks.append(torch.empty(CHUNK_BYTES, dtype=torch.uint8, device="cpu", pin_memory=self._pinned))
        start = self._used
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return self._chunks[self._number][start : start + size]


def is_asynchronous(device: torch.device) -> bool:
    """Returns whether copies from the device to pinned memory go on while the host does, until ``wait_for``."""
    return device.type == "cuda"


def wait_for(device: torch.device) -> None:
    """Waits until the device has done what was put on its current stream so far, and for no other stream."""
    with torch.cuda.device(device):
        event = torch.cuda.Event()
        event.record()
        event.synchronize()


def _copies(data: Tensor, room: _Room) -> Iterator[Tensor]:
    """Yields copies of the elements, piece by piece in row-major order. They may be under way."""
    source = as_bits(data.detach())
    if source.is_contiguous():
        source = source.view(-1)  # pieces of one row are as large as they may be
    for box in cut(whole(tuple(source.shape)), PIECE_BYTES // source.dtype.itemsize):
        copy = room.take(box.numel * source.dtype.itemsize).view(source.dtype).view(box.sizes)
        yield copy.copy_(narrowed(source, box), non_blocking=is_asynchronous(source.device))
