"""Divides the parameters of a param group into buckets."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_asgd.buckets.base import Bucket, BucketOptions
from dist_asgd.buckets.dtensor import PlacedBucket
from dist_asgd.buckets.flat import FlatBucket
from dist_asgd.buckets.local_tensors import is_placed
from dist_asgd.buckets.replicas import MeshLayout, Replicas, mesh_layout_of
from dist_asgd.sharding.layout import plan_buckets
from dist_asgd.sharding.shard_views import local_of


def build_buckets(
    named: Mapping[Tensor, str], gradients: str, options: BucketOptions, replicas: Replicas
) -> list[Bucket]:
    """Returns buckets for the parameters of one param group. Collective.

    Parameters that are frozen now get buckets of their own, so that no state is kept for them until they are trained.

    Args:
        named: the parameters with their names.
        gradients: the optimizer's option, "local", "reduced" or "sharded".
        options: the options that all buckets share.
        replicas: finds the ranks that share state of DTensors.
    """
    placed = {param: name for param, name in named.items() if is_placed(param, gradients)}
    plain = {param: name for param, name in named.items() if param not in placed}
    reduces = gradients == "local" and options.group is not None
    return [*_build_replicated(plain, options, reduces), *_build_placed(placed, options, replicas)]


def _build_replicated(named: Mapping[Tensor, str], options: BucketOptions, reduces: bool) -> list[FlatBucket]:
    """Returns buckets of plain parameters, separate for each device and dtype, and of frozen ones. Collective."""
    kinds: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = {}
    for param in named:
        kinds.setdefault((param.device, param.dtype, param.requires_grad), []).append(param)
    buckets = []
    for (device, dtype, _), params in kinds.items():
        collectives = options.collectives(device)
        numels = [param.numel() for param in params]
        max_numel = options.bucket_bytes // dtype.itemsize
        for layout in plan_buckets(numels, world_size=options.world_size, max_numel=max_numel):
            of_bucket = {params[span.index]: named[params[span.index]] for span in layout.spans}
            buckets.append(FlatBucket(of_bucket, layout, options, collectives, reduces))
    return buckets


def _build_placed(named: Mapping[Tensor, str], options: BucketOptions, replicas: Replicas) -> list[PlacedBucket]:
    """Returns buckets of DTensors and slices, separate for each mesh layout, device and dtype, and of frozen ones.

    Collective.
    """
    replica_groups = replicas.find_groups({param: name for param, name in named.items() if isinstance(param, DTensor)})
    kinds: dict[tuple[MeshLayout | None, torch.device, torch.dtype, bool], list[Tensor]] = {}
    for param in named:
        mesh_layout = mesh_layout_of(param) if isinstance(param, DTensor) else None
        kinds.setdefault((mesh_layout, param.device, param.dtype, param.requires_grad), []).append(param)
    buckets: list[PlacedBucket] = []
    in_flight: deque[PlacedBucket] = deque()
    for (mesh_layout, device, dtype, _), params in kinds.items():
        own = None if mesh_layout is None else replica_groups[mesh_layout]
        collectives = None if own is None else own.collectives(device)
        world_size = 1 if collectives is None else collectives.world_size
        numels = [local_of(param).numel() for param in params]
        for layout in plan_buckets(numels, world_size=world_size, max_numel=options.bucket_bytes // dtype.itemsize):
            of_bucket = {params[span.index]: named[params[span.index]] for span in layout.spans}
            buckets.append(PlacedBucket(of_bucket, layout, options, own, in_flight))
    return buckets
