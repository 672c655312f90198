"""Sharded checkpoints on any fsspec URL: committed atomically, checksummed, and read without unpickling.

``Checkpointer`` keeps the checkpoints of a run below one URL, one directory a step. ``save`` and ``load`` write and
read a single checkpoint. The protocol by which a checkpoint comes into existence is described in
``checkpoint/saving/commit.py``; the files are specified in ``docs/checkpoint-format.md``.
"""

from dist_asgd.checkpoint.checkpointer import Checkpointer, load, save
from dist_asgd.checkpoint.errors import CheckpointError, DamagedCheckpoint
from dist_asgd.checkpoint.state.rng import RandomState
from dist_asgd.checkpoint.state.sharing import PerRank

__all__ = ["CheckpointError", "Checkpointer", "DamagedCheckpoint", "PerRank", "RandomState", "load", "save"]
