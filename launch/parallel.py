"""How the ranks share one model and its data: `--parallel` of train.py.

| mode    | each of N ranks keeps                             | gradients are averaged by |
|---------|---------------------------------------------------|---------------------------|
| zero    | the model                                         | the optimizer             |
| ddp     | the model                                         | DistributedDataParallel   |
| fsdp    | 1/N of each tensor; gathers a block to compute it | FSDP2                     |
| hsdp    | 2/N of each tensor: there are two replicas        | FSDP2                     |
| tp      | 1/N of the heads and hidden units of each block   | nobody: all read the same |
| fsdp+tp | 2/N of half of them: tp in pairs, fsdp over pairs | FSDP2                     |

The model, the order of the data and the results are the same in each, up to rounding. The optimizer's state is sharded
over all ranks in each.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from world import World

MODES = ("zero", "ddp", "fsdp", "hsdp", "tp", "fsdp+tp")


@dataclass(frozen=True, slots=True)
class Layout:
    """Who has what, seen from one rank."""

    mode: str
    world: World
    team: int  # this many neighbouring ranks work on the same sequences, each with a part of every block

    @property
    def data_rank(self) -> int:
        """Which of the `data_size` shares of a batch this rank reads."""
        return self.world.rank // self.team

    @property
    def data_size(self) -> int:
        return self.world.size // self.team

    def sum(self, *values: float) -> list[float]:
        """Each of the values added up over the shares of a batch: of a team, which has the same, one rank counts."""
        counts = self.world.rank % self.team == 0
        return self.world.sum(*(counts * value for value in values))

    def spread(self, model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """Spread a model, the same on every rank and on its device, over the ranks. Collective.

        Returns:
            The module to call, and what ShardedASGD must be told. The parameters and their names are those of `model`.
        """
        if self.mode == "zero":
            return model, {"gradients": "local"}
        if self.mode == "ddp":
            return DistributedDataParallel(model), {"gradients": "reduced"}
        mesh = self._mesh()
        if "tp" in self.mode:
            _cut_blocks(model, mesh["team"])
        if self.mode == "tp":  # what is not cut is whole on every rank, and so is its gradient
            return model, {"gradients": "reduced"}
        for module in (*model.get_submodule("blocks").children(), model):
            fully_shard(module, mesh=mesh["shards"] if self.mode == "fsdp+tp" else mesh)
        return model, {"gradients": "reduced", "module": model}

    def _mesh(self) -> DeviceMesh:
        n = self.world.size
        dims = {
            "fsdp": {"shards": n},
            "hsdp": {"replicas": 2, "shards": n // 2},
            "tp": {"team": n},
            "fsdp+tp": {"shards": n // 2, "team": 2},
        }[self.mode]
        ranks = torch.arange(n).view(*dims.values())
        # init_device_mesh() would give the groups torch's timeouts.
        groups = []
        for dim, size in enumerate(ranks.shape):
            teams = ranks.movedim(dim, -1).reshape(-1, size).tolist()
            groups.append(dist.new_subgroups_by_enumeration(teams, timeout=self.world.patience)[0])
        if len(groups) == 1:
            return DeviceMesh.from_group(groups[0], self.world.device.type, mesh_dim_names=tuple(dims))
        return DeviceMesh.from_group(groups, self.world.device.type, ranks, mesh_dim_names=tuple(dims))


def layout_of(mode: str, world: World, heads: int) -> Layout:
    """The layout of one of MODES, if the ranks and the model's attention heads allow it."""
    if world.control is None and mode != "zero":
        raise SystemExit(f"--parallel {mode} needs ranks: start it with torchrun.")
    if mode in ("hsdp", "fsdp+tp") and world.size % 2:
        raise SystemExit(f"--parallel {mode} needs an even number of ranks, and here are {world.size}.")
    team = {"tp": world.size, "fsdp+tp": 2}.get(mode, 1)
    if heads % team:  # where the heads divide, the width does
        raise SystemExit(f"--parallel {mode} deals out heads to {team} ranks: make --heads {heads} a multiple of that.")
    return Layout(mode, world, team)


def _cut_blocks(model: nn.Module, team: DeviceMesh) -> None:
    """Give each rank of the team some of the heads and of the hidden units; a block's output is their sum."""
    for block in model.get_submodule("blocks").children():
        plan = {
            "attention.1.qkv": ColwiseParallel(),
            "attention.1.out": RowwiseParallel(),
            "perceptron.1": ColwiseParallel(),
            "perceptron.3": RowwiseParallel(),
        }
        parallelize_module(block, team, plan)
