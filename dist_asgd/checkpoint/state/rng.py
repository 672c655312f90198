"""The random number generators of a rank as an object with a state."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class RandomState:
    """Stands for the generators of this rank in what is saved and loaded: ``{"rng": RandomState()}``.

    Those are Python's ``random``, NumPy's global one if NumPy was imported, torch's of the CPU, and those of all its
    GPUs, the current one first. Each rank has its own; on a rank that had none, loading leaves the generators as they
    are and logs a warning.
    """

    def state_dict(self) -> dict[str, Any]:
        """One value: ranks may have the same in a part of it, and still need all of it."""
        numpy = sys.modules.get("numpy")
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        generators = {
            "python": random.getstate(),
            "numpy": None if numpy is None else numpy.random.get_state(),
            "torch": _bytes(torch.get_rng_state()),
            "cuda": [_bytes(torch.cuda.get_rng_state(device)) for device in _devices()] if cuda else [],
        }
        return {"generators": tuple(generators.items())}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Sets the generators. NumPy's and those of GPUs stay as they are if there were none."""
        generators = dict(state_dict["generators"])
        random.setstate(generators["python"])
        numpy = sys.modules.get("numpy")
        if numpy is not None and generators["numpy"] is not None:
            numpy.random.set_state(generators["numpy"])
        torch.set_rng_state(_tensor(generators["torch"]))
        if generators["cuda"] and torch.cuda.is_available():
            for device, state in zip(_devices(), generators["cuda"], strict=False):
                torch.cuda.set_rng_state(_tensor(state), device)


def warn_unchanged(key: str) -> None:
    """For a rank that the checkpoint has no state for."""
    logging.getLogger(__name__).warning(
        "the checkpoint has no random state %r for this rank: its generators go on as they are, so give them seeds of "
        "their own where more ranks resume than have saved",
        key,
    )


def _devices() -> list[int]:
    """All GPUs, the current one first: a rank may have another one when it resumes."""
    current = torch.cuda.current_device()
    return [current, *(device for device in range(torch.cuda.device_count()) if device != current)]


def _bytes(state: Tensor) -> bytes:
    return bytes(state.tolist())


def _tensor(state: bytes) -> Tensor:
    return torch.tensor(list(state), dtype=torch.uint8, device="cpu")
