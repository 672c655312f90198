"""``RandomState``: saves and restores the random number generators of a rank."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class RandomState:
    """The random number generators of this rank, as an object to save and to load: ``{"rng": RandomState()}``.

    They are Python's ``random``; NumPy's global generator, if NumPy is imported; torch's generator of the CPU; and
    torch's generators of all GPUs of this process, the current GPU first, if CUDA is in use. Each rank saves its own.
    On a rank for which the checkpoint has none, loading leaves the generators as they are and logs a warning.
    """

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of all generators, as a tuple of pairs, which checkpoints save as a single value.

        Entries of their own could be saved once for all ranks whose state of one generator happens to be equal; a rank
        must get all of its generators or none.
        """
        numpy = sys.modules.get("numpy")
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        generators = {
            "python": random.getstate(),
            "numpy": None if numpy is None else numpy.random.get_state(),
            "torch": _to_bytes(torch.get_rng_state()),
            "cuda": [_to_bytes(torch.cuda.get_rng_state(device)) for device in _devices()] if cuda else [],
        }
        return {"generators": tuple(generators.items())}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Sets the generators. NumPy's and those of GPUs stay as they are if their states were not saved."""
        generators = dict(state_dict["generators"])
        random.setstate(generators["python"])
        numpy = sys.modules.get("numpy")
        if numpy is not None and generators["numpy"] is not None:
            numpy.random.set_state(generators["numpy"])
        torch.set_rng_state(_to_tensor(generators["torch"]))
        if generators["cuda"] and torch.cuda.is_available():
            for device, state in zip(_devices(), generators["cuda"], strict=False):
                torch.cuda.set_rng_state(_to_tensor(state), device)


def warn_unchanged(key: str) -> None:
    """Logs that the checkpoint has no random state for this rank; ``key``: of the ``RandomState`` in the state."""
    logging.getLogger(__name__).warning(
        "the checkpoint has no random state %r for this rank: its generators go on as they are, so give them seeds of "
        "their own where more ranks resume than have saved",
        key,
    )


def _devices() -> list[int]:
    """Returns the numbers of all GPUs, the current one first: it may have another number when the rank resumes."""
    current = torch.cuda.current_device()
    return [current, *(device for device in range(torch.cuda.device_count()) if device != current)]


def _to_bytes(state: Tensor) -> bytes:
    return bytes(state.tolist())


def _to_tensor(state: bytes) -> Tensor:
    return torch.tensor(list(state), dtype=torch.uint8, device="cpu")
