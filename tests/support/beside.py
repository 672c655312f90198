"""Models under every layout that train with averages beside their optimizer."""

from typing import Any

import torch
from torch import Tensor, nn

from dist_asgd import EMA, ShardedASGD, ShardedAverages, Uniform
from tests.support import layouts
from tests.support.layouts import Model, backward, named_parameters, whole

KINDS = {"ema": EMA(0.8), "mean": Uniform()}
STEPS = 5


def build(layout: str, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, ShardedAverages]:
    model = layouts.place(layout, Model(0))
    named = named_parameters(model)
    if layout == "zero":
        optimizer: torch.optim.Optimizer = ShardedASGD(list(named.items()), lr=0.05, gradients="local")
    else:
        optimizer = torch.optim.AdamW(list(named.values()), lr=0.01, foreach="tp" not in layout)
    averages = ShardedAverages(named.items(), KINDS, optimizer=optimizer, module=model, **options)
    return model, optimizer, averages


def iterate(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(param) for name, param in named_parameters(model).items()}


def trained(layout: str, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, ShardedAverages, list[Any]]:
    model, optimizer, averages = build(layout, **options)
    iterates = []
    for step in range(STEPS):
        backward(model, layout, step)
        optimizer.step()
        optimizer.zero_grad()
        iterates.append(iterate(model))
    return model, optimizer, averages, iterates
