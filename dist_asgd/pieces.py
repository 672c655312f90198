"""Names under which version 0.1 pickled tensors of state dicts; ``torch.load(weights_only=False)`` imports them."""

from dist_asgd.sharding.placement import Placement
from dist_asgd.sharding.sharded_state import StatePiece

__all__ = ["Placement", "StatePiece"]
