"""Which ranks have the same of a DTensor, and the process groups in which they share its state.

[Note: replicas] A rank's block of a DTensor follows from its coordinates in those dims of the mesh that shard. Ranks
with equal ones are *replicas*: along replicated dims (HSDP, the norms of tensor parallelism), and where the mesh leaves
ranks out. FSDP2 puts a parameter on the ``dp`` slice of a ``(dp, tp)`` mesh, say, if no layer of tensor parallelism has
it: then every tp rank has the same. It may also be another parameter of the same name on another mesh (experts), which
nothing but its values can tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dist_asgd._torch_private import local_tensor
from dist_asgd.comm.collectives import Collectives
from dist_asgd.comm.consensus import Agreement, fingerprint
from dist_asgd.comm.process_groups import separate_subgroup
from dist_asgd.kernels.tensor_list import as_real

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
        self._collectives: dict[tuple[tuple[int, ...], str], Collectives | None] = {}

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
        values = self._mirrored_values(named, sharing)
        # One number of each rank and family. What it is made of grows with the parameters: only to name a difference.
        codes = self._agreement.gather([fingerprint(values[family]) for family in families])
        if _differ(everyone, codes):
            self._require_same_values(values, sharing)
        return sharing

    def collectives(self, ranks: tuple[int, ...], device: torch.device) -> Collectives | None:
        """Between ``ranks``; None where they share nothing. Collective."""
        if len(ranks) == 1 or not self._share or self._group is None:
            return None
        key = (ranks, device.type)
        if key not in self._collectives:
            members = [self._global_rank(rank) for rank in ranks]
            # Parameters that are offloaded to the CPU may have a mesh of GPUs, whose backend does not take them.
            backend = "gloo" if device.type == "cpu" else None
            group = separate_subgroup(self._group, members, backend)
            self._collectives[key] = None if group is None else Collectives.on(group, device)
        return self._collectives[key]

    def _global_rank(self, rank: int) -> int:
        return self._agreement.ranks[rank] if self._agreement.ranks else rank

    def _mirrored_values(
        self, named: Mapping[DTensor, str], sharing: Mapping[Family, Sharing]
    ) -> dict[Family, list[tuple[str, str]]]:
        """By family, the names and digests of the parameters that other ranks must have and no mesh makes sure of."""
        values: dict[Family, list[tuple[str, str]]] = {family: [] for family in sharing}
        for param, name in named.items():
            family = family_of(param)
            if sharing[family].mirrors and local_tensor(param).numel():
                values[family].append((name, str(sum_and_norm(local_tensor(param)).tolist())))
        return values

    def _require_same_values(
        self, values: Mapping[Family, list[tuple[str, str]]], sharing: Mapping[Family, Sharing]
    ) -> None:
        found = [
            (sharing[family].mirrors[:1], mesh_ranks(family[0]), dict(of_family))
            for family, of_family in values.items()
        ]
        everyone = self._agreement.gather(found)
        for rank, families in enumerate(everyone):
            for index, (first, ranks, digests) in enumerate(families):
                for name, digest in digests.items():
                    _, first_ranks, others = everyone[first[0]][index]
                    if digest != others.get(name):
                        raise ValueError(
                            f"parameter {name!r} is on the mesh of ranks {first_ranks} on rank {first[0]} and on that "
                            f"of ranks {ranks} on rank {rank}, with other values: either these are different "
                            "parameters of one name, then build an optimizer for each mesh "
                            "(process_group=mesh.get_group()), or copies that came apart: start them equal, or put the "
                            "parameter on a mesh of all ranks"
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
        return self._replicas.collectives(self.ranks, device)


def _differ(coordinates: Sequence[Sequence[Coordinates]], codes: Sequence[Sequence[int]]) -> bool:
    """Whether ranks of the same coordinates have another code of a family. Both by rank, then by family."""
    first: dict[tuple[int, Coordinates], int] = {}
    return any(
        first.setdefault((index, own), code) != code
        for of_rank, of_codes in zip(coordinates, codes, strict=True)
        for index, (own, code) in enumerate(zip(of_rank, of_codes, strict=True))
    )


def sum_and_norm(tensor: Tensor) -> Tensor:
    """Returns a weighted sum and the 2-norm of the elements of ``tensor``: 1-D, 2 elements, fp64, on its device.

    Two tensors for which they differ have different values. No two elements have one weight, because the plain sum says
    nothing about the gradients of a softmax, which add up to zero.
    """
    flat = as_real(tensor.detach().flatten().resolve_conj()).double()
    weights = torch.linspace(0.5, 1.5, len(flat), dtype=flat.dtype, device=flat.device)
    return torch.stack([weights @ flat, flat.norm()])
