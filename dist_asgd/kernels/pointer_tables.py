"""Tables in device memory by which one kernel launch finds its way through parts that lie anywhere.

They are written when parts are first seen. Of a step, only the addresses of gradients are sent, if they are other ones
than before, from pinned memory, so that the host never waits.
"""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from dist_asgd.asgd.schedule import is_captured
from dist_asgd.kernels.tensor_list import TensorList

STEP = "take a step() without capturing it before each capture"


class DeviceTables:
    """What a kernel whose programs update a block of a part each reads of ``parts``.

    Args:
        block: how many elements that is.

    Attributes:
        of_parts: their addresses, starts and numels; then, for each program, its part (upper 32 bits) and block.
        programs: how many.
    """

    def __init__(self, parts: TensorList, block: int) -> None:
        self._device = parts.tensors[0].device
        if is_captured(self._device):  # they would be sent from memory that is not the graph's
            raise RuntimeError(f"a CUDA graph is being captured, and these parameters were not updated before: {STEP}")
        tables = [torch.frombuffer(table, dtype=torch.int64) for table in (parts.addresses, parts.starts, parts.numels)]
        blocks = (tables[2] + (block - 1)) // block
        part = torch.repeat_interleave(blocks)
        place = torch.arange(len(part)) - (blocks.cumsum(0) - blocks)[part]
        self.programs = len(part)
        self.of_parts = self._pinned(torch.cat([*tables, part << 32 | place])).to(self._device, non_blocking=True)
        self._sent: tuple[array[int], Tensor] | None = None
        self._spares: list[tuple[Tensor, Tensor]] = []
        self._of_graphs: list[tuple[Tensor, Tensor]] = []
        self._count = len(parts.tensors)

    def of_grads(self, addresses: array[int]) -> Tensor:
        """``addresses``, those of gradients, in device memory.

        Each time in pinned memory of its own, which PyTorch does not hand out again before the copy is done.
        """
        if is_captured(self._device):
            return self._captured(addresses)
        if self._device.type == "cuda" and not self._spares:
            self._spares.append(self._pair())
        if self._sent is None or self._sent[0] != addresses:
            values = self._pinned(torch.frombuffer(addresses, dtype=torch.int64))
            self._sent = (addresses, values.to(self._device, non_blocking=True))
        if self._device.type == "cuda":  # where the stream is not the one they were made on, they must outlive its work
            for table in (self.of_parts, self._sent[1]):
                table.record_stream(torch.cuda.current_stream(self._device))
        return self._sent[1]

    def _captured(self, addresses: array[int]) -> Tensor:
        """A graph sends them again whenever it is replayed: the memory is its own, as long as there are the parts.

        It was got before, since pinned memory must not be while a stream is captured.
        """
        if not self._spares:
            raise RuntimeError(f"there is no pinned memory for the gradients' addresses of another CUDA graph: {STEP}")
        host, device = self._spares.pop()
        self._of_graphs.append((host, device))
        host.copy_(torch.frombuffer(addresses, dtype=torch.int64))
        return device.copy_(host, non_blocking=True)

    def _pair(self) -> tuple[Tensor, Tensor]:
        host = self._pinned(torch.zeros(self._count, dtype=torch.int64))
        return host, torch.empty_like(host, device=self._device)

    def _pinned(self, values: Tensor) -> Tensor:
        return values.pin_memory() if self._device.type == "cuda" else values
