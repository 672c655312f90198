"""How layouts cut the parameters of a model over ranks: what one rank holds, and with whom it shares state."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dist_asgd.planning.model import ModelSizes, ParameterSize
from dist_asgd.sharding.layout import BucketLayout, plan_buckets

LAYOUTS = ("zero", "ddp", "fsdp", "hsdp", "tp")


@dataclass(frozen=True, slots=True)
class Layout:
    """A way to spread a model over ranks.

    Attributes:
        name: one of ``LAYOUTS``.
        world_size: the number of ranks.
        shards: the ranks over which FSDP2 or tensor parallelism cuts parameters; 1 for other layouts.
        cut: patterns of the names of parameters that tensor parallelism cuts. Other layouts cut all or none.
    """

    name: str
    world_size: int
    shards: int = 1
    cut: Sequence[str] = ()

    @classmethod
    def of(cls, name: str, world_size: int, replicas: int, cut: Sequence[str]) -> Layout:
        """Returns the layout of options. ``replicas`` is for ``hsdp``, ``cut`` for ``tp``.

        Raises:
            ValueError: the options do not fit together.
        """
        if name == "tp" and not cut:
            raise ValueError("tp needs the names of the parameters that it cuts: --cut 'layers.*.mlp.*', repeatable")
        if name != "tp" and cut:
            raise ValueError(f"--cut is for --layout tp, and this is {name}")
        if name == "hsdp" and world_size % replicas:
            raise ValueError(f"hsdp of {replicas} replicas needs a multiple of as many ranks, not {world_size}")
        shards = {"fsdp": world_size, "hsdp": world_size // replicas, "tp": world_size}.get(name, 1)
        return cls(name, world_size, shards, tuple(cut))

    def require_names(self, model: ModelSizes) -> None:
        """Raises ``ValueError`` where a pattern of ``cut`` fits no parameter."""
        for pattern in self.cut:
            if not any(fnmatch.fnmatchcase(parameter.name, pattern) for parameter in model.parameters):
                names = ", ".join(parameter.name for parameter in model.parameters[:3])
                raise ValueError(f"--cut {pattern!r} fits no parameter; the first ones are {names}")

    @property
    def is_fsdp(self) -> bool:
        return self.name in ("fsdp", "hsdp")

    def is_cut(self, parameter: ParameterSize) -> bool:
        """Whether ranks hold parts of a parameter."""
        return self.is_fsdp or any(fnmatch.fnmatchcase(parameter.name, pattern) for pattern in self.cut)

    def block(self, parameter: ParameterSize) -> int:
        """Returns the elements of a parameter on the rank that has most of it."""
        if not self.is_cut(parameter):
            return parameter.numel
        if not self.is_fsdp:  # tensor parallelism cuts along a dim that the ranks divide
            return -(-parameter.numel // self.shards)
        rows = parameter.shape[0] if parameter.shape else 1
        return -(-rows // self.shards) * (parameter.numel // max(rows, 1))

    def sharers(self, parameter: ParameterSize) -> int:
        """Returns the number of ranks that hold equal blocks of a parameter, and share its state."""
        return self.world_size // self.shards if self.is_cut(parameter) else self.world_size


@dataclass(frozen=True, slots=True)
class PlannedBucket:
    """A bucket of blocks of parameters whose state is shared by ``layout.world_size`` ranks."""

    layout: BucketLayout
    dtype: torch.dtype
    is_cut: bool  # whether its parameters are in parts on the ranks

    @property
    def nbytes(self) -> int:
        """Bytes of the bucket's parameters, padding included."""
        return self.layout.numel * self.dtype.itemsize


def plan_layout(model: ModelSizes, layout: Layout, bucket_bytes: int) -> list[PlannedBucket]:
    """Returns the buckets of the trained parameters on the rank that holds most of them."""
    kinds: dict[tuple[torch.dtype, bool], list[ParameterSize]] = {}
    for parameter in model.parameters:
        if parameter.is_trained:
            kinds.setdefault((parameter.dtype, layout.is_cut(parameter)), []).append(parameter)
    return [
        PlannedBucket(bucket, dtype, is_cut)
        for (dtype, is_cut), parameters in kinds.items()
        for bucket in plan_buckets(
            [layout.block(parameter) for parameter in parameters],
            world_size=layout.sharers(parameters[0]),
            max_numel=bucket_bytes // dtype.itemsize,
        )
    ]
