"""Averaged SGD with its state sharded over ranks, averages to use, and checkpoints on any fsspec target."""

__version__ = "0.1.0"

from dist_asgd.averages import EMA, PolynomialDecay, Tail, Uniform
from dist_asgd.checkpoint import Checkpointer, load, save
from dist_asgd.checkpoint.shipping import export
from dist_asgd.optimizer import ShardedASGD
from dist_asgd.trigger import NonMonotonicTrigger

__all__ = [
    "EMA",
    "Checkpointer",
    "NonMonotonicTrigger",
    "PolynomialDecay",
    "ShardedASGD",
    "Tail",
    "Uniform",
    "__version__",
    "export",
    "load",
    "save",
]
