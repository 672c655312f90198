"""Averaged SGD with its state sharded over ranks, further averages of weights, and checkpoints on any fsspec URL."""

__version__ = "0.2.0"

import logging

from dist_asgd.averages.kinds import EMA, PolynomialDecay, Tail, TwoTailed, Uniform
from dist_asgd.averages.triggers import NonMonotonicTrigger
from dist_asgd.checkpoint import Checkpointer, load, save
from dist_asgd.checkpoint.export.from_model import export
from dist_asgd.checkpoint.merging.merge import merge
from dist_asgd.optimizer import ShardedASGD
from dist_asgd.sharded_averages import ShardedAverages

__all__ = [
    "EMA",
    "Checkpointer",
    "NonMonotonicTrigger",
    "PolynomialDecay",
    "ShardedASGD",
    "ShardedAverages",
    "Tail",
    "TwoTailed",
    "Uniform",
    "__version__",
    "export",
    "load",
    "merge",
    "save",
]

logging.getLogger("dist_asgd").addHandler(logging.NullHandler())  # silent until the program asks for logs
