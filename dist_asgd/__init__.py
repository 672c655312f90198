"""Averaged SGD with its state sharded over ranks, averages to use, and checkpoints on any fsspec target."""

__version__ = "0.1.0"

from dist_asgd.checkpoint import Checkpointer, load, save
from dist_asgd.optimizer import ShardedASGD

__all__ = ["Checkpointer", "ShardedASGD", "__version__", "load", "save"]
