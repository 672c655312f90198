"""How the parameters of a group become buckets."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_asgd.buckets.base import Bucket, Setting
from dist_asgd.buckets.dtensor import PlacedBucket
from dist_asgd.buckets.flat import ReplicatedBucket
from dist_asgd.buckets.local_tensors import is_placed
from dist_asgd.buckets.replicas import Family, Replicas, family_of
from dist_asgd.sharding.layout import plan_buckets
from dist_asgd.sharding.shard_views import local_of


def build_buckets(named: Mapping[Tensor, str], gradients: str, setting: Setting, replicas: Replicas) -> list[Bucket]:
    """Buckets for the parameters, with their names, of one group. Collective.

    Args:
        gradients: as the optimizer's.
    """
    placed = {param: name for param, name in named.items() if is_placed(param, gradients)}
    plain = {param: name for param, name in named.items() if param not in placed}
    reduces = gradients == "local" and setting.group is not None
    return [*_build_replicated(plain, setting, reduces), *_build_placed(placed, setting, replicas)]


def _build_replicated(named: Mapping[Tensor, str], setting: Setting, reduces: bool) -> list[ReplicatedBucket]:
    """Buckets for the parameters, with their names, of one group: apart by device and dtype. Collective."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for param in named:
        kinds.setdefault((param.device, param.dtype), []).append(param)
    buckets = []
    for (device, dtype), params in kinds.items():
        collectives = setting.collectives(device)
        numels = [param.numel() for param in params]
        for layout in plan_buckets(
            numels, world_size=setting.world_size, max_numel=setting.bucket_bytes // dtype.itemsize
        ):
            of_bucket = [params[span.index] for span in layout.spans]
            names = {param: named[param] for param in of_bucket}
            buckets.append(ReplicatedBucket(names, layout, setting, collectives, reduces))
    return buckets


def _build_placed(named: Mapping[Tensor, str], setting: Setting, replicas: Replicas) -> list[PlacedBucket]:
    """Buckets for the DTensors and slices, with their names, of one group. Collective."""
    sharing = replicas.find({param: name for param, name in named.items() if isinstance(param, DTensor)})
    kinds: dict[tuple[Family | None, torch.device, torch.dtype], list[Tensor]] = {}
    for param in named:
        family = family_of(param) if isinstance(param, DTensor) else None
        kinds.setdefault((family, param.device, param.dtype), []).append(param)
    buckets: list[PlacedBucket] = []
    in_flight: deque[PlacedBucket] = deque()
    for (family, device, dtype), params in kinds.items():
        own = None if family is None else sharing[family]
        collectives = None if own is None else own.collectives(device)
        world_size = 1 if collectives is None else collectives.world_size
        numels = [local_of(param).numel() for param in params]
        for layout in plan_buckets(numels, world_size=world_size, max_numel=setting.bucket_bytes // dtype.itemsize):
            of_bucket = {params[span.index]: named[params[span.index]] for span in layout.spans}
            buckets.append(PlacedBucket(of_bucket, layout, setting, own, in_flight))
    return buckets
