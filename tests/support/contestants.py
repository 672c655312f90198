"""The model that the benchmarks train, and the ways of training it with averaged SGD on several ranks.

Every way is a function ``(model, t0) -> (model to call, optimizer)``; it holds just what a user of that way writes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import ASGD, AdamW, Optimizer

from dist_asgd import EMA, ShardedASGD, ShardedAverages

WIDTH = 512
ROWS = 8  # batch: small, so that an iteration is mostly what is measured
LR = 1e-3
Build = Callable[[nn.Module, float], tuple[nn.Module, Optimizer]]


class Block(nn.Module):
    """A transformer's residual feed-forward block: 2,100,736 parameters at width 512."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (rows, width) -> (rows, width)
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def make_model(parameters: float, width: int = WIDTH) -> nn.Sequential:
    """As many blocks as come nearest to ``parameters`` fp32 parameters, the same values on every rank."""
    torch.manual_seed(0)
    one = sum(p.numel() for p in Block(width).parameters())
    return nn.Sequential(*(Block(width) for _ in range(max(1, round(parameters / one)))))


def parameter_bytes(model: nn.Module) -> int:
    """P: the bytes of all parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def make_batch(rank: int, width: int = WIDTH, rows: int = ROWS) -> Tensor:  # (rows, width)
    """Rank ``rank``'s own batch."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1 + rank))


def backward(model: nn.Module, batch: Tensor) -> None:
    """Forward and backward of a loss that every parameter takes part in."""
    model(batch).square().mean().backward()


def iterate(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> None:
    """One training iteration."""
    backward(model, batch)
    optimizer.step()
    optimizer.zero_grad()


def ours(model: nn.Module, t0: float, *, overlap: bool, **options: Any) -> tuple[nn.Module, Optimizer]:
    options |= {"module": model} if overlap else {}
    return model, ShardedASGD(model.named_parameters(), lr=LR, t0=t0, gradients="local", **options)


def ours_reduced(model: nn.Module, t0: float) -> tuple[nn.Module, Optimizer]:
    return DistributedDataParallel(model), ShardedASGD(model.named_parameters(), lr=LR, t0=t0, gradients="reduced")


def alone(model: nn.Module, t0: float) -> tuple[nn.Module, Optimizer]:
    """torch.optim.ASGD on a single rank."""
    return model, ASGD(model.parameters(), lr=LR, t0=t0)


def ddp(model: nn.Module, t0: float, *, view: bool = False) -> tuple[nn.Module, Optimizer]:
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=view)
    return wrapped, ASGD(wrapped.parameters(), lr=LR, t0=t0)


def ddp_adamw(model: nn.Module, t0: float) -> tuple[nn.Module, Optimizer]:
    wrapped = DistributedDataParallel(model)
    return wrapped, AdamW(wrapped.parameters(), lr=LR)


def fsdp2_adamw(model: nn.Module, t0: float, *, replicas: int = 1) -> tuple[nn.Module, Optimizer]:
    shard(model, replicas)
    return model, AdamW(model.parameters(), lr=LR)


def zero(model: nn.Module, t0: float, *, view: bool = False) -> tuple[nn.Module, Optimizer]:
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=view)
    return wrapped, ZeroRedundancyOptimizer(wrapped.parameters(), optimizer_class=ASGD, lr=LR, t0=t0)


def fsdp2(model: nn.Module, t0: float, *, reshard: bool) -> tuple[nn.Module, Optimizer]:
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.children():
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    return model, ASGD(model.parameters(), lr=LR, t0=t0)


def ours_fsdp2(model: nn.Module, t0: float, *, replicas: int = 1, **options: Any) -> tuple[nn.Module, Optimizer]:
    shard(model, replicas)
    return model, ShardedASGD(model.named_parameters(), lr=LR, t0=t0, module=model, **options)


def shard(model: nn.Module, replicas: int) -> None:
    """Shards the parameters by FSDP2, or by HSDP where there are several replicas."""
    size = dist.get_world_size()
    shape, names = ((size,), ("shards",)) if replicas == 1 else ((replicas, size // replicas), ("replicas", "shards"))
    mesh = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names)
    for block in model.children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def averages_beside(model: nn.Module, optimizer: Optimizer, start: float = 0) -> ShardedAverages:
    """One average of the weights, which follows the optimizer."""
    return ShardedAverages(model.named_parameters(), EMA(0.999), optimizer=optimizer, start=start, module=model)


CONTESTANTS: dict[str, Build] = {
    "ours": partial(ours, overlap=True),
    "ours, without module=": partial(ours, overlap=False),
    "ours, wire_dtype=bf16": partial(ours, overlap=True, wire_dtype=torch.bfloat16),
    "DDP + ours, gradients=reduced": ours_reduced,
    "DDP + ASGD": ddp,
    "DDP (bucket views) + ASGD": partial(ddp, view=True),
    "DDP + ZeroRedundancyOptimizer": zero,
    "DDP (bucket views) + ZeroRedundancyOptimizer": partial(zero, view=True),
    "FSDP2 + ASGD": partial(fsdp2, reshard=True),
    "FSDP2 (no reshard) + ASGD": partial(fsdp2, reshard=False),
    "FSDP2 + ours": ours_fsdp2,
    "HSDP (2 replicas) + ours": partial(ours_fsdp2, replicas=2),
    "DDP + AdamW": ddp_adamw,
    "FSDP2 + AdamW": fsdp2_adamw,
    "HSDP (2 replicas) + AdamW": partial(fsdp2_adamw, replicas=2),
}
CONTESTANTS |= {f"ours, {n} MiB buckets": partial(ours, overlap=True, bucket_bytes=n * 2**20) for n in (1, 4, 8, 25)}
