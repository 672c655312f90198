"""Finds the ranks that hold equal blocks of DTensors, and the process groups in which they share optimizer state.

[Note: replicas] A rank's block of a DTensor follows from the rank's coordinates in the mesh dims that shard. Ranks with
equal coordinates there are *replicas*: along replicated dims (HSDP, the norms of tensor parallelism), and where the
mesh leaves ranks out. An example of the second: FSDP2 puts a parameter that no layer of tensor parallelism shards on
the ``dp`` slice of a ``(dp, tp)`` mesh, so every tp rank has an equal copy. Two meshes may also hold different
parameters under one name (experts). Only the values tell the two cases apart, so ranks compare digests of the values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dist_asgd._torch_private import local_tensor
from dist_asgd.comm.collectives import Collectives
from dist_asgd.comm.consensus import Agreement, fingerprint
from dist_asgd.comm.digests import digests
from dist_asgd.comm.process_groups import SeparateGroups

Coordinates = tuple[int, ...]
MeshLayout = tuple[DeviceMesh, tuple[Any, ...]]  # the mesh of a DTensor and its placements on the mesh


def mesh_layout_of(param: DTensor) -> MeshLayout:
    """Returns the mesh and the placements of ``param``."""
    return param.device_mesh, tuple(param.placements)


def mesh_ranks(mesh: DeviceMesh) -> list[int]:
    """Returns the global ranks of ``mesh``."""
    return list(mesh.mesh.flatten().tolist())


def shard_coordinates(mesh_layout: MeshLayout) -> Coordinates:
    """Returns this rank's coordinates in the mesh dims that shard."""
    mesh, placements = mesh_layout
    coordinate: list[int] = list(mesh.get_coordinate() or [])
    return tuple(index for index, placement in zip(coordinate, placements, strict=True) if not placement.is_replicate())


class Replicas:
    """Finder of the ranks that hold equal blocks of DTensors, and maker of their process groups.

    Args:
        agreement: exchanges among the ranks of the optimizer.
        groups: the process groups of the optimizer; None for one rank.
        share: whether replicas share the optimizer state of their block. Otherwise each keeps the whole state.
    """

    def __init__(self, agreement: Agreement, groups: SeparateGroups | None, share: bool) -> None:
        self._agreement, self._groups, self._share = agreement, groups, share
        self._collectives: dict[tuple[tuple[int, ...], str], Collectives] = {}

    def find_groups(self, named: Mapping[DTensor, str]) -> dict[MeshLayout, ReplicaGroup]:
        """Returns the replicas of this rank for each mesh layout of the parameters. Collective.

        Every rank must have parameters of the same mesh layouts in one order.

        Raises:
            ValueError: on every rank, where parameters that should be replicas have different values.
        """
        mesh_layouts = list(dict.fromkeys(map(mesh_layout_of, named)))
        if not mesh_layouts:
            return {}
        everyone = self._agreement.gather([shard_coordinates(mesh_layout) for mesh_layout in mesh_layouts])
        replica_groups = {}
        for index, mesh_layout in enumerate(mesh_layouts):
            own = everyone[self._agreement.rank][index]
            ranks = tuple(rank for rank, coordinates in enumerate(everyone) if coordinates[index] == own)
            spread = not set(map(self._global_rank, ranks)) <= set(mesh_ranks(mesh_layout[0]))
            replica_groups[mesh_layout] = ReplicaGroup(ranks, ranks if spread else (), self)
        values = self._digests(named, replica_groups)
        # Ranks exchange one number for each mesh layout. The digests are longer, and needed only to name a difference.
        codes = self._agreement.gather([fingerprint(values[mesh_layout]) for mesh_layout in mesh_layouts])
        if _differ(everyone, codes):
            self._require_same_values(values, replica_groups)
        return replica_groups

    def collectives(self, ranks: tuple[int, ...], device: torch.device) -> Collectives | None:
        """Returns collectives among ``ranks`` (numbers in the optimizer) for ``device``; None where no state is shared.

        Collective among ``ranks`` when first called for a type of device.
        """
        if len(ranks) == 1 or not self._share or self._groups is None:
            return None
        key = (ranks, device.type)
        if key not in self._collectives:
            members = [self._global_rank(rank) for rank in ranks]
            # Parameters offloaded to the CPU may have a mesh of GPUs, whose backend takes no CPU tensors.
            backend = "gloo" if device.type == "cpu" else None
            self._collectives[key] = Collectives.on(self._groups, members, device, backend)
        return self._collectives[key]

    def _global_rank(self, rank: int) -> int:
        return self._agreement.ranks[rank] if self._agreement.ranks else rank

    def _digests(
        self, named: Mapping[DTensor, str], replica_groups: Mapping[MeshLayout, ReplicaGroup]
    ) -> dict[MeshLayout, list[tuple[str, int]]]:
        """Returns names and digests of the parameters whose replicas are on other meshes, by mesh layout."""
        values: dict[MeshLayout, list[tuple[str, int]]] = {mesh_layout: [] for mesh_layout in replica_groups}
        compared = [
            (mesh_layout, name, local_tensor(param))
            for param, name in named.items()
            if replica_groups[mesh_layout := mesh_layout_of(param)].compared_ranks and local_tensor(param).numel()
        ]
        found = digests([local for _, _, local in compared])
        for (mesh_layout, name, _), number in zip(compared, found, strict=True):
            values[mesh_layout].append((name, number))
        return values

    def _require_same_values(
        self, values: Mapping[MeshLayout, list[tuple[str, int]]], replica_groups: Mapping[MeshLayout, ReplicaGroup]
    ) -> None:
        found = [
            (replica_groups[mesh_layout].compared_ranks[:1], mesh_ranks(mesh_layout[0]), dict(of_layout))
            for mesh_layout, of_layout in values.items()
        ]
        everyone = self._agreement.gather(found)
        for rank, mesh_layouts in enumerate(everyone):
            for index, (first, ranks, own) in enumerate(mesh_layouts):
                for name, digest in own.items():
                    _, first_ranks, others = everyone[first[0]][index]
                    if digest != others.get(name):
                        raise ValueError(
                            f"parameter {name!r} is on the mesh of ranks {first_ranks} on rank {first[0]} and on that "
                            f"of ranks {ranks} on rank {rank}, with other values: either these are different "
                            "parameters of one name, then build an optimizer for each mesh "
                            "(process_group=mesh.get_group()), or copies that came apart: start them equal, or put the "
                            "parameter on a mesh of all ranks"
                        )


class ReplicaGroup:
    """The ranks that hold equal blocks of the parameters of one mesh layout.

    Attributes:
        ranks: the replicas, this rank included, as numbers in the optimizer, ascending.
        compared_ranks: ``ranks`` where some of them are on another mesh, so that no collective of the mesh keeps
            their values equal; otherwise empty.
    """

    def __init__(self, ranks: tuple[int, ...], compared_ranks: tuple[int, ...], replicas: Replicas) -> None:
        self.ranks, self.compared_ranks, self._replicas = ranks, compared_ranks, replicas

    def collectives(self, device: torch.device) -> Collectives | None:
        """Returns collectives among ``ranks`` for ``device``; None where no state is shared. Collective."""
        return self._replicas.collectives(self.ranks, device)


def _differ(coordinates: Sequence[Sequence[Coordinates]], codes: Sequence[Sequence[int]]) -> bool:
    """Whether ranks with equal coordinates have different codes. Both arguments are by rank, then by mesh layout."""
    first: dict[tuple[int, Coordinates], int] = {}
    return any(
        first.setdefault((index, own), code) != code
        for of_rank, of_codes in zip(coordinates, codes, strict=True)
        for index, (own, code) in enumerate(zip(of_rank, of_codes, strict=True))
    )
