"""Which ranks have the same of a DTensor, and the process groups in which they share its state.

[Note: replicas] A rank's block of a DTensor follows from its coordinates in those dims of the mesh that shard. Ranks
with equal ones are *replicas*: along replicated dims (HSDP, the norms of tensor parallelism), and where the mesh leaves
ranks out. FSDP2 puts a parameter on the ``dp`` slice of a ``(dp, tp)`` mesh, say, if no layer of tensor parallelism has
it: then every tp rank has the same. It may also be another parameter of the same name on another mesh (experts), which
nothing but its values can tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dist_asgd.agreement import Agreement, subgroup_of_its_own
from dist_asgd.collectives import Collectives
from dist_asgd.parts import as_real
from dist_asgd.pieces import local_tensor

Coordinates = tuple[int, ...]
Family = tuple[DeviceMesh, tuple[Any, ...]]  # what DTensors of one mesh and one tuple of placements have in common


def family_of(param: DTensor) -> Family:
    return param.device_mesh, tuple(param.placements)


def mesh_ranks(mesh: DeviceMesh) -> list[int]:
    """The ranks of the mesh, in the numbers of all ranks."""
    ranks: list[int] = mesh.mesh.flatten().tolist()
    return ranks


def shard_coordinates(family: Family) -> Coordinates:
    """This rank's coordinates in the dims of the mesh that shard."""
    mesh, placements = family
    coordinate: list[int] = list(mesh.get_coordinate() or [])
    return tuple(index for index, placement in zip(coordinate, placements, strict=True) if not placement.is_replicate())


class Replicas:
    """The ranks that share the state of a DTensor.

    Args:
        group: the ranks of the optimizer.
        share: False: every replica keeps the whole state of its block.
    """

    def __init__(self, agreement: Agreement, group: dist.ProcessGroup | None, share: bool) -> None:
        self._agreement, self._group, self._share = agreement, group, share
        self._groups: dict[tuple[tuple[int, ...], str], dist.ProcessGroup | None] = {}

    def find(self, named: Mapping[DTensor, str]) -> dict[Family, Sharing]:
        """For each family of the parameters, who shares it. Collective: every rank has the same families in order.

        Raises:
            ValueError: on every rank, where what ought to be replicas has different values.
        """
        families = list(dict.fromkeys(map(family_of, named)))
        if not families:
            return {}
        everyone = self._agreement.gather([shard_coordinates(family) for family in families])
        sharing = {}
        for index, family in enumerate(families):
            own = everyone[self._agreement.rank][index]
            ranks = tuple(rank for rank, coordinates in enumerate(everyone) if coordinates[index] == own)
            implied = not set(map(self._global_rank, ranks)) <= set(mesh_ranks(family[0]))
            sharing[family] = Sharing(ranks, ranks if implied else (), self)
        self._require_same_values(named, sharing)
        return sharing

    def group(self, ranks: tuple[int, ...], device: torch.device) -> dist.ProcessGroup | None:
        if len(ranks) == 1 or not self._share or self._group is None:
            return None
        key = (ranks, device.type)
        if key not in self._groups:
            members = [self._global_rank(rank) for rank in ranks]
            # Parameters that are offloaded to the CPU may have a mesh of GPUs, whose backend does not take them.
            backend = "gloo" if device.type == "cpu" else None
            self._groups[key] = subgroup_of_its_own(self._group, members, backend)
        return self._groups[key]

    def _global_rank(self, rank: int) -> int:
        return rank if self._group is None else dist.get_global_rank(self._group, rank)

    def _require_same_values(self, named: Mapping[DTensor, str], sharing: Mapping[Family, Sharing]) -> None:
        values: dict[str, tuple[tuple[int, ...], list[int], str]] = {}
        for param, name in named.items():
            mirrors = sharing[family_of(param)].mirrors
            if mirrors and local_tensor(param).numel():
                values[name] = (mirrors, mesh_ranks(param.device_mesh), str(_digest(local_tensor(param))))
        everyone = self._agreement.gather(values)
        for rank, found in enumerate(everyone):
            for name, (mirrors, ranks, digest) in found.items():
                _, first_ranks, first = everyone[mirrors[0]][name]
                if digest != first:
                    raise ValueError(
                        f"parameter {name!r} is on the mesh of ranks {first_ranks} on rank {mirrors[0]} and on that of "
                        f"ranks {ranks} on rank {rank}, with other values: either these are different parameters of "
                        "one name, then build an optimizer for each mesh (process_group=mesh.get_group()), or copies "
                        "that came apart: start them equal, or put the parameter on a mesh of all ranks"
                    )


class Sharing:
    """Who has the same of the parameters of one family.

    Attributes:
        mirrors: ``ranks`` where that is not the mesh's doing, so that nothing makes sure of it; else empty.
    """

    def __init__(self, ranks: tuple[int, ...], mirrors: tuple[int, ...], replicas: Replicas) -> None:
        self.ranks, self.mirrors, self._replicas = ranks, mirrors, replicas

    def collectives(self, device: torch.device) -> Collectives | None:
        """Between the ranks that share; None where this one has nobody to share with. Collective."""
        group = self._replicas.group(self.ranks, device)
        return None if group is None else Collectives(group, device.type)


def _digest(tensor: Tensor) -> list[float]:
    flat = as_real(tensor.detach().flatten().resolve_conj()).double()
    weights = torch.linspace(0.5, 1.5, len(flat), dtype=flat.dtype, device=flat.device)
    total: list[float] = torch.stack([weights @ flat, flat.norm()]).tolist()
    return total
