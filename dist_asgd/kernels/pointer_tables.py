"""Keeps tables of addresses in device memory, so that one kernel launch can update tensors that lie anywhere.

The tables of parameters are sent once. A step sends only the addresses of gradients, and only if they have changed,
from pinned memory, so that the host never waits.
"""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from dist_asgd.asgd.schedule import is_captured
from dist_asgd.kernels.tensor_list import TensorList

STEP = "take a step() without capturing it before each capture"


class DeviceTables:
    """The tables for a kernel each of whose programs updates one block of one of ``parts``.

    Args:
        parts: the tensors to be updated.
        block: the number of elements that a program updates.

    Attributes:
        of_parts: 1-D, int64: addresses, starts and numels of ``parts``; then, for each program, the index of its part
            (upper 32 bits) and the index of its block in the part (lower 32 bits).
        programs: the number of programs.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """

    def __init__(self, parts: TensorList, block: int) -> None:
        self._device = parts.tensors[0].device
        if is_captured(self._device):  # a replay would read host memory that the graph does not own
            raise RuntimeError(f"a CUDA graph is being captured, and these parameters were not updated before: {STEP}")
        tables = [torch.frombuffer(table, dtype=torch.int64) for table in (parts.addresses, parts.starts, parts.numels)]
        blocks = (tables[2] + (block - 1)) // block
        part = torch.repeat_interleave(blocks)
        place = torch.arange(len(part), device="cpu") - (blocks.cumsum(0) - blocks)[part]
        self.programs = len(part)
        self.of_parts = self._pinned(torch.cat([*tables, part << 32 | place])).to(self._device, non_blocking=True)
        self._sent: tuple[array[int], Tensor] | None = None  # the gradients' addresses, and their copy on the device
        self._spares: list[tuple[Tensor, Tensor]] = []  # unused (host, device) buffers, each 1-D, int64
        self._of_graphs: list[tuple[Tensor, Tensor]] = []  # (host, device) buffers that captured graphs use
        self._count = len(parts.tensors)

    def of_grads(self, addresses: array[int]) -> Tensor:
        """Returns ``addresses``, which are those of the gradients, in device memory: 1-D, int64.

        Every copy starts from a new pinned buffer, which PyTorch does not reuse before the copy is done.

        Raises ``RuntimeError`` if a CUDA graph is being captured and no step was taken since the last capture.
        """
        if is_captured(self._device):
            return self._captured(addresses)
        if self._device.type == "cuda" and not self._spares:
            host = self._pinned(torch.zeros(self._count, dtype=torch.int64, device="cpu"))
            self._spares.append((host, torch.empty_like(host, device=self._device)))
        if self._sent is None or self._sent[0] != addresses:
            values = self._pinned(torch.frombuffer(addresses, dtype=torch.int64))
            self._sent = (addresses, values.to(self._device, non_blocking=True))
        if self._device.type == "cuda":  # the current stream need not be the one they were made on
            for table in (self.of_parts, self._sent[1]):
                table.record_stream(torch.cuda.current_stream(self._device))
        return self._sent[1]

    def _captured(self, addresses: array[int]) -> Tensor:
        """Copies ``addresses`` within a CUDA graph, from a buffer that is reserved for the graph.

        Every replay copies from this buffer again, so it lives as long as this object. It was allocated before the
        capture, since pinned memory must not be allocated during one.
        """
        if not self._spares:
            raise RuntimeError(f"there is no pinned memory for the gradients' addresses of another CUDA graph: {STEP}")
        host, device = self._spares.pop()
        self._of_graphs.append((host, device))
        host.copy_(torch.frombuffer(addresses, dtype=torch.int64))
        return device.copy_(host, non_blocking=True)

    def _pinned(self, values: Tensor) -> Tensor:
        return values.pin_memory() if self._device.type == "cuda" else values
