"""Averages on the host, of parameters on another device, which are copied to the host block by block."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_asgd.kernels.averaging import move_averages_
from dist_asgd.kernels.tensor_list import TensorList

# Elements of a block. Two blocks are under way at once: one is copied while the CPU averages the other.
BLOCK = 2**22


@dataclass(frozen=True, slots=True)
class _HostBlock:
    """A block of parameters that is being copied to the host."""

    start: int  # index of its first element in the averages
    data: Tensor  # 1-D, on the CPU
    copied: torch.cuda.Event | None  # None where the copy is complete

    @classmethod
    def of(cls, start: int, block: Tensor) -> _HostBlock:
        """Starts the copy of ``block``, on the current stream of its device where that has events."""
        if block.device.type != "cuda":
            return cls(start, block.to("cpu"), None)
        data = torch.empty(block.shape, dtype=block.dtype, device="cpu", pin_memory=True)
        with torch.cuda.device(block.device):
            data.copy_(block, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        return cls(start, data, copied)


def move_host_averages_(parts: TensorList, averages: Sequence[Tensor], mus: Sequence[float]) -> None:
    """Does what ``move_averages_`` does, with averages on the CPU and parameters on another device.

    Waits for the device. On the host it needs memory for two blocks; on the device, none.
    """
    pending: deque[_HostBlock] = deque()
    for start, block in _blocks(parts):
        if len(pending) == 2:
            _move(pending.popleft(), averages, mus)
        pending.append(_HostBlock.of(start, block))
    while pending:
        _move(pending.popleft(), averages, mus)


def copy_on(device: torch.device, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a copy of ``values`` on ``device``; on the CPU in pinned memory where ``values`` are on a GPU."""
    if device.type == "cpu" and values.device.type == "cuda":
        return torch.empty(values.shape, dtype=dtype, device=device, pin_memory=True).copy_(values)
    return values.to(device, dtype, copy=True)


def _blocks(parts: TensorList) -> Iterator[tuple[int, Tensor]]:
    for part, start in zip(parts.tensors, parts.starts, strict=True):
        for number, block in enumerate(part.reshape(-1).split(BLOCK)):
            yield start + number * BLOCK, block


def _move(block: _HostBlock, averages: Sequence[Tensor], mus: Sequence[float]) -> None:
    if block.copied is not None:
        block.copied.synchronize()
    own = [average[block.start : block.start + len(block.data)] for average in averages]
    move_averages_(TensorList.of([block.data]), own, mus)
