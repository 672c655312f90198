"""Checkpoints on any fsspec target: sharded, committed at once, checksummed, read without unpickling anything."""

from dist_asgd.checkpoint.entries import CheckpointError
from dist_asgd.checkpoint.manager import Checkpointer, load, save
from dist_asgd.checkpoint.random_state import RandomState

__all__ = ["CheckpointError", "Checkpointer", "RandomState", "load", "save"]
