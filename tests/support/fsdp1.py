"""Models wrapped in FSDP1, and their training."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    ShardingStrategy,
    StateDictType,
)

from dist_asgd import ShardedASGD
from tests.support.layouts import Model, batch

OPTIONS: dict[str, Any] = {"lr": 0.05, "lambd": 1e-3, "t0": 5}


CONFIGS = {
    "full": (
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(rank0_only=False),
        FullOptimStateDictConfig(rank0_only=False),
    ),
    "sharded": (StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(), ShardedOptimStateDictConfig()),
}


def wrap(model: nn.Module, strategy: str = "FULL_SHARD", **options: Any) -> FullyShardedDataParallel:
    options |= {
        "use_orig_params": True,
        "device_id": torch.device("cpu"),
        "sharding_strategy": ShardingStrategy[strategy],
    }
    for index, block in enumerate(model.blocks):
        model.blocks[index] = FullyShardedDataParallel(block, **options)
    return FullyShardedDataParallel(model, **options)


def build(strategy: str = "FULL_SHARD", seed: int = 0, **more: Any) -> tuple[FullyShardedDataParallel, ShardedASGD]:
    model = wrap(Model(seed), strategy)
    return model, ShardedASGD(model.named_parameters(), **{"module": model, **OPTIONS, **more})


def backward(model: nn.Module, step: int) -> None:
    x, y = batch(step, dist.get_rank(), dist.get_world_size())
    (model(x) - y).square().mean().backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def model_state(model: nn.Module) -> dict[str, Tensor]:
    with FullyShardedDataParallel.state_dict_type(model, *CONFIGS["full"]):
        return model.state_dict()
