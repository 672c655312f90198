"""How ranks share the entries of a checkpoint, and ``PerRank``, by which users say that each rank has its own."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist


class PerRank:
    """Marks state of which each rank has its own: ``{"expert": PerRank(module)}``.

    Without it, parameters and the state of optimizers must be equal on all ranks that save them under one name. A
    checkpoint keeps what is marked once for each rank, as ``expert.weight@rank3``, and a load gives it back to the same
    rank. It can be loaded into ``PerRank`` only, on as many ranks as have saved it.

    Args:
        value: a module, an optimizer, or anything else that a state may hold, such as a dict of these. A rank must
            have the whole of each tensor in it.
    """

    def __init__(self, value: Any) -> None:
        self.value = value


class Sharing(enum.Enum):
    """How ranks share an entry that several of them have."""

    EQUAL = "ranks must have it equal; it is kept once"
    FIRST = "the lowest rank's is kept"
    VARYING = "it is kept once if all ranks have it equal, and otherwise for each rank"
    SUBGROUP = "it is kept once if all process groups have it equal, and otherwise for each of them"
    OWN = "it is kept for each rank"


@runtime_checkable
class HasBuffers(Protocol):
    """An object with a state in which buffers of a model are, of which rank 0's count."""

    def is_buffer(self, path: tuple[str | int, ...]) -> bool:
        """Returns whether the entry at ``path`` of its state dict is a buffer."""


@runtime_checkable
class OnProcessGroup(Protocol):
    """An optimizer that says which ranks share its parameters."""

    @property
    def process_group(self) -> dist.ProcessGroup | None: ...


def subgroup_of(optimizer: object) -> tuple[int, ...]:
    """Returns the global ranks that share the optimizer's parameters, ascending; () for all ranks or if unknown."""
    is_optimizer = isinstance(optimizer, torch.optim.Optimizer)
    if not is_optimizer or not isinstance(optimizer, OnProcessGroup) or optimizer.process_group is None:
        return ()
    ranks = dist.get_process_group_ranks(optimizer.process_group)
    return tuple(sorted(ranks)) if len(ranks) < dist.get_world_size() else ()


def first_of(subgroup: Sequence[int], ranks: Sequence[int]) -> int | None:
    """Returns the place in ``ranks`` of the lowest rank of ``subgroup``; None if the subgroup has all of ``ranks``.

    Args:
        subgroup: global ranks; () for all ranks.
        ranks: global ranks that save or load together.

    Raises:
        ValueError: the subgroup has some of ``ranks``, and others.
    """
    if not subgroup or set(ranks) <= set(subgroup):
        return None
    if not set(subgroup) <= set(ranks):
        raise ValueError(
            f"an optimizer is on the process group of ranks {list(subgroup)}, and the checkpoint is of ranks "
            f"{list(ranks)}: all ranks of the optimizer must save and load it together"
        )
    return list(ranks).index(subgroup[0])
