"""Checkpoints on any fsspec target: sharded, committed at once, checksummed, read without unpickling anything."""

from dist_asgd.checkpoint.checkpointer import Checkpointer, load, save
from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.state.rng import RandomState

__all__ = ["CheckpointError", "Checkpointer", "RandomState", "load", "save"]
