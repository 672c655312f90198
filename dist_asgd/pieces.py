"""Pickles of the 0.1 release name ``StatePiece`` and ``Placement`` as members of this module, so they are found here.

``torch.load(weights_only=False)`` of a saved ``ShardedASGD.state_dict()`` imports the module.
"""

from dist_asgd.sharding.placement import Placement as Placement
from dist_asgd.sharding.sharded_state import StatePiece as StatePiece
