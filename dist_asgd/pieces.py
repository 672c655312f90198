"""Tensors of sharded state dicts, for files that each rank writes by itself.

Version 0.1 pickled ``Placement`` and ``StatePiece`` by these names, which ``torch.load(weights_only=False)`` imports.
"""

from dist_asgd.sharding.placement import Placement
from dist_asgd.sharding.sharded_state import StatePiece, rank_local

__all__ = ["Placement", "StatePiece", "rank_local"]
