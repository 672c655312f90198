"""The contestants, one module each, which imports its package."""

from __future__ import annotations

import importlib

from benchmarks.averaging_wounds.peer import Peer

# The names of their columns, and the modules and distributions they are in.
PEERS = {
    "ours": ("ours", "dist-asgd"),
    "AveragedModel": ("averaged_model", "torch"),
    "ema-pytorch": ("ema_pytorch", "ema-pytorch"),
    "diffusers": ("diffusers_ema", "diffusers"),
    "Lightning": ("lightning_averaging", "lightning"),
    "timm": ("timm_ema", "timm"),
    "torchtitan": ("torchtitan_ema", "torchtitan"),
}


def load_peer(name: str) -> type[Peer]:
    """Imports the peer of a column. Raises ``ImportError`` where its package is not installed."""
    module, _ = PEERS[name]
    kind: type[Peer] = importlib.import_module(f"{__name__}.{module}").KIND
    return kind
