"""What the contestants average: small models that 2 ranks train, whose iterates are known."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

Values = dict[str, Tensor]  # whole tensors by the names of the plain model, fp64 or integers


def sgd(params: Iterable[nn.Parameter], lr: float = 0.1, **options: Any) -> torch.optim.Optimizer:
    """Returns plain SGD, which has no state, so that a resumed training needs the weights alone."""
    return torch.optim.SGD(params, lr=lr, **options)


@dataclass(frozen=True)
class Training:
    """A training without its averages.

    Attributes:
        make: returns the plain model, with equal values on every rank.
        loss: the loss of a model at a step, counted from 0.
        layout: "alone", "ddp" or "fsdp" (FSDP2, each child module and the whole).
        optimizer: makes the optimizer of parameters.
        is_compiled: whether the model is compiled before it is averaged.
        overflows: the steps whose gradients are not finite; None trains without a GradScaler.
    """

    make: Callable[[], nn.Module]
    loss: Callable[[nn.Module, int], Tensor]
    layout: str = "ddp"
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = sgd
    is_compiled: bool = False
    overflows: tuple[int, ...] | None = None

    def place(self, model: nn.Module) -> nn.Module:
        """Returns the module to call in training. FSDP2 shards ``model`` in place."""
        if self.layout == "ddp":
            return DistributedDataParallel(model)
        if self.layout == "fsdp":
            shard(model)
        return model

    def loss_at(self, model: nn.Module, step: int) -> Tensor:
        """Returns the loss, which is infinite where gradients shall overflow."""
        loss = self.loss(model, step)
        return loss * torch.inf if step in (self.overflows or ()) else loss


def shard(model: nn.Module) -> nn.Module:
    """Shards a model by FSDP2 with its defaults, as its tutorial does: blocks by themselves, the head with the rest."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    *blocks, _ = [child for child in model.children() if any(True for _ in child.parameters())]
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def plain_name(name: str) -> str:
    """Returns the name of a parameter or buffer without the prefixes of torch.compile and DDP."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def values(model: nn.Module) -> Values:
    """Returns copies of all parameters and buffers, whole. Collective under FSDP2."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {plain_name(name): whole(tensor) for name, tensor in named}


def whole(tensor: Tensor) -> Tensor:
    """Returns a whole copy of a tensor, in fp64 if it is of floating point. Collective for a DTensor."""
    tensor = tensor.detach()
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.to(torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True)


# Models and their losses ---------------------------------------------------------------------------------------------


def make_layers(widths: tuple[int, ...], seed: int = 0) -> nn.Sequential:
    """Returns linear layers of these widths with tanh between them."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inner, outer in itertools.pairwise(widths):
        layers += [nn.Linear(inner, outer), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def batch(step: int, width: int) -> tuple[Tensor, Tensor]:  # (16, width), (16, 1)
    """Returns the data of a step, which are equal on every rank."""
    x = torch.randn(16, width, generator=torch.Generator().manual_seed(step))
    return x, x.sum(1, keepdim=True).sin()


def regression(model: nn.Module, step: int, width: int) -> Tensor:
    """Returns the mean squared error on the data of a step."""
    x, y = batch(step, width)
    return (model(x) - y).square().mean()


def regression_of(*widths: int, **options: Any) -> Training:
    """Returns the training of linear layers of these widths."""
    loss = functools.partial(regression, width=widths[0])
    return Training(functools.partial(make_layers, widths), loss, **options)


class Weights(nn.Module):
    """A model that is nothing but a vector of weights. Its output is their product with what it is called with."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(start.clone())  # 1-D

    def forward(self, gradient: Tensor) -> Tensor:
        return (self.weights * gradient).sum()


def scripted(start: Tensor, iterates: Tensor) -> Training:
    """Returns a training whose weights begin at ``start`` and after step ``n`` are row ``n`` of ``iterates``, exactly.

    The loss is linear with the wanted step as its gradient, and the learning rate is 1.
    """
    steps = torch.cat([start[None], iterates]).diff(dim=0)
    return Training(
        lambda: Weights(start),
        lambda model, step: model(-steps[step]),
        optimizer=functools.partial(sgd, lr=1.0),
    )
