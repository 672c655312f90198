"""How the parameters of a group become buckets."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dist_asgd.buckets import Bucket, Setting
from dist_asgd.local import is_placed
from dist_asgd.placed import build_placed
from dist_asgd.replicas import Replicas
from dist_asgd.replicated import build_replicated


def build_buckets(named: Mapping[Tensor, str], gradients: str, setting: Setting, replicas: Replicas) -> list[Bucket]:
    """Buckets for the parameters, with their names, of one group. Collective.

    Args:
        gradients: as the optimizer's.
    """
    placed = {param: name for param, name in named.items() if is_placed(param, gradients)}
    plain = {param: name for param, name in named.items() if param not in placed}
    reduces = gradients == "local" and setting.group is not None
    return [*build_replicated(plain, setting, reduces), *build_placed(placed, setting, replicas)]
