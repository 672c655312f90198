"""Divides the parameters of a param group into buckets."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_asgd._torch_private import is_fsdp1_slice
from dist_asgd.buckets.averaged import AveragedBucket
from dist_asgd.buckets.base import Bucket, BucketOptions, ShardingOptions
from dist_asgd.buckets.dtensor import PlacedBucket
from dist_asgd.buckets.flat import FlatBucket
from dist_asgd.buckets.in_place import InPlaceBucket
from dist_asgd.buckets.local_tensors import is_placed
from dist_asgd.buckets.replicas import MeshLayout, ReplicaGroup, Replicas, mesh_layout_of
from dist_asgd.sharding.layout import BucketLayout, plan_buckets
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
        max_numel = options.max_numel(dtype, device, collectives)
        for layout in plan_buckets(numels, world_size=options.world_size, max_numel=max_numel):
            of_bucket = {params[span.index]: named[params[span.index]] for span in layout.spans}
            buckets.append(FlatBucket(of_bucket, layout, options, collectives, reduces))
    return buckets


def _build_placed(named: Mapping[Tensor, str], options: BucketOptions, replicas: Replicas) -> list[PlacedBucket]:
    """Returns buckets of DTensors and slices. Collective."""
    in_flight: deque[InPlaceBucket] = deque()
    return [
        PlacedBucket(of_bucket, layout, options, own, in_flight)
        for of_bucket, layout, own in _layouts(named, options, replicas, of_plain=None)
    ]


def build_averaged(named: Mapping[Tensor, str], options: ShardingOptions, replicas: Replicas) -> list[AveragedBucket]:
    """Returns buckets for averages beside another optimizer, of parameters that stay where they are. Collective.

    Args:
        named: DTensors, slices of FSDP1 and plain parameters, which every rank has whole, with their names.
        options: the options that all buckets share.
        replicas: finds the ranks that share averages.
    """
    slices = {param: name for param, name in named.items() if is_fsdp1_slice(param)}
    others = {param: name for param, name in named.items() if param not in slices}
    everyone = ReplicaGroup(tuple(range(options.world_size)), (), replicas)
    in_flight: deque[InPlaceBucket] = deque()
    return [
        AveragedBucket(of_bucket, layout, options, own, in_flight)
        for params, of_plain in ((others, everyone), (slices, None))
        for of_bucket, layout, own in _layouts(params, options, replicas, of_plain)
    ]


def _layouts(
    named: Mapping[Tensor, str], options: ShardingOptions, replicas: Replicas, of_plain: ReplicaGroup | None
) -> Iterator[tuple[dict[Tensor, str], BucketLayout, ReplicaGroup | None]]:
    """Yields the parameters of each bucket, its layout and its replicas; those are ``of_plain`` for plain tensors.

    Collective. Buckets are separate for each mesh layout, device and dtype, and for frozen parameters.
    """
    replica_groups = replicas.find_groups({param: name for param, name in named.items() if isinstance(param, DTensor)})
    kinds: dict[tuple[MeshLayout | None, torch.device, torch.dtype, bool], list[Tensor]] = {}
    for param in named:
        mesh_layout = mesh_layout_of(param) if isinstance(param, DTensor) else None
        kinds.setdefault((mesh_layout, param.device, param.dtype, param.requires_grad), []).append(param)
    for (mesh_layout, device, dtype, _), params in kinds.items():
        own = of_plain if mesh_layout is None else replica_groups[mesh_layout]
        collectives = None if own is None else own.collectives(device)
        world_size = 1 if collectives is None else collectives.world_size
        numels = [local_of(param).numel() for param in params]
        max_numel = options.max_numel(dtype, device, collectives)
        for layout in plan_buckets(numels, world_size=world_size, max_numel=max_numel):
            yield {params[span.index]: named[params[span.index]] for span in layout.spans}, layout, own
