"""Orders the streams of a device: what one of them has waited for, and memory that several of them use."""

from __future__ import annotations

import torch
from torch import Tensor


class Completion:
    """The point of one stream at which tensors are complete, for which every other stream has to wait."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None  # None where nothing was recorded
        self._event: torch.cuda.Event | None = None

    def record(self, device: torch.device) -> None:
        """Takes the work that the current stream of ``device`` was given so far for what completes the tensors."""
        if has_streams(device):
            self._stream = torch.cuda.current_stream(device)
            self._event = self._stream.record_event()

    def wait(self) -> None:
        """Makes the current stream of the device wait, and not the host, unless it is the stream of ``record()``.

        A stream that is being captured in a CUDA graph does not wait: it must not for an event from outside of the
        graph, and the capture has begun with a wait for the whole device.
        """
        if self._stream is None or self._event is None:
            return
        current = torch.cuda.current_stream(self._stream.device)
        if current != self._stream and not torch.cuda.is_current_stream_capturing():
            current.wait_event(self._event)


def has_streams(device: torch.device) -> bool:
    """Returns whether work on the device is ordered by streams."""
    return device.type == "cuda"


def used_by_current_stream(*tensors: Tensor) -> None:
    """Keeps the memory of ``tensors``, once they are freed, until the current streams of their devices are done.

    Without it, the allocator hands the memory out again at once, in the order of the stream that has allocated it.
    """
    for tensor in tensors:
        if has_streams(tensor.device):
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
