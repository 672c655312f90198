"""One model under every parallelism, for tests that the optimizer means the same under each of them."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from dist_asgd import ShardedASGD
from tests.support import dtensors

# Three ranks leave remainders everywhere, four have meshes of two dimensions; most other tests run on two.
WORLD_SIZES = {
    "zero": (1, 3, 4),
    "ddp": (2, 3),
    "fsdp": (1, 3, 4),
    "hsdp": (2, 4),
    "tp": (1, 3),
    "fsdp+tp": (2, 4),
}
EVERYWHERE = [(layout, size) for layout, sizes in WORLD_SIZES.items() for size in sizes]
FSDP2 = ("fsdp", "hsdp", "fsdp+tp")


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    """Sizes that no number of ranks divides, but for `hidden`, which tensor parallelism cuts."""

    def __init__(self, seed: int = 0, width: int = 10, hidden: int = 24, depth: int = 2) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inside = nn.Linear(7, width)
            self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(depth))
            self.outside = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(x)
        for block in self.blocks:
            x = block(x)
        return self.outside(x)


def mesh_of(layout: str) -> DeviceMesh:
    size = dist.get_world_size()
    if layout == "hsdp":
        return init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    if layout == "fsdp+tp":
        return init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
    return init_device_mesh("cpu", (size,), mesh_dim_names=("tp" if layout == "tp" else "dp",))


def tensor_parallel(model: nn.Module, mesh: DeviceMesh, sequence: bool = False) -> None:
    """Cuts the hidden dims of the blocks; with `sequence` the norms work on parts of the batch (partial gradients)."""
    for block in model.blocks:
        if sequence:
            distribute_module(block.norm, mesh, input_fn=_cut_batch)
        inputs = Shard(0) if sequence else Replicate()
        parallelize_module(block, mesh, {"up": ColwiseParallel(input_layouts=inputs), "down": RowwiseParallel()})


def _cut_batch(_: nn.Module, inputs: tuple[Tensor], mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False).redistribute(mesh, [Shard(0)])


def place(layout: str, model: nn.Module, **fsdp: Any) -> nn.Module:
    """The model under `layout`; DDP wraps it."""
    if layout == "ddp":
        return DistributedDataParallel(model)
    mesh = mesh_of(layout)
    if "tp" in layout:
        tensor_parallel(model, mesh["tp"])
    if layout in FSDP2:
        data = mesh["dp"] if layout == "fsdp+tp" else mesh
        for block in model.blocks:
            fully_shard(block, mesh=data, **fsdp)
        fully_shard(model, mesh=data, **fsdp)
    return model


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict((model.module if isinstance(model, DistributedDataParallel) else model).named_parameters())


def options_of(layout: str, model: nn.Module) -> dict[str, Any]:
    """What the layout wants of the optimizer."""
    return {
        "gradients": "local" if layout == "zero" or layout in FSDP2 else "reduced",
        "module": model if layout in FSDP2 else None,
    }


def build(layout: str, seed: int = 0, **options: Any) -> tuple[nn.Module, ShardedASGD]:
    model = place(layout, Model(seed))
    return model, ShardedASGD(list(named_parameters(model).items()), **options_of(layout, model), **options)


def data_rank(layout: str) -> tuple[int, int]:
    """Which part of the batch this rank trains on, of how many."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if layout == "tp":
        return 0, 1
    return (rank // 2, size // 2) if layout == "fsdp+tp" else (rank, size)


def batch(step: int, part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, 7, generator=generator)
    y = x.sum(1, keepdim=True).sin()
    return x.chunk(parts)[part], y.chunk(parts)[part]


def backward(model: nn.Module, layout: str, step: int) -> None:
    x, y = batch(step, *data_rank(layout))
    (model(x) - y).square().mean().backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, layout: str, steps: range) -> None:
    for step in steps:
        backward(model, layout, step)
        optimizer.step()
        optimizer.zero_grad()


def give_gradients(params: Mapping[str, Tensor], step: int) -> None:
    """The same gradients under every layout: of integers, so that the mean over ranks is exact."""
    generator = torch.Generator().manual_seed(step)
    for param in params.values():
        grad = torch.randint(-8, 9, param.shape, generator=generator).to(param.dtype) / 8
        if isinstance(param, DTensor):
            grad = dtensors.distribute(grad, param)
        param.grad = grad


def whole(tensor: Tensor) -> Tensor:
    """Returns a copy of the whole tensor. Collective on the mesh of a DTensor."""
    return dtensors.gather(tensor) if isinstance(tensor, DTensor) else tensor.detach().clone()


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor of the optimizer's state."""
    return tensor.to_local() if isinstance(tensor, DTensor) else getattr(tensor, "local", tensor)
