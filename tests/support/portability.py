"""Training that goes on from a checkpoint under another layout, and its reference in one process."""

from typing import Any

import torch
from torch import nn

from dist_asgd import ShardedASGD
from tests.support.layouts import Model, give_gradients, named_parameters, whole
from tests.support.oracle import check_dense_state, same_bits

OPTIONS: dict[str, Any] = {"lr": 0.05, "lambd": 1e-3, "t0": 3}


SAVED, LAST = 6, 9  # averaging has begun at SAVED


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients(named_parameters(model), step)
        optimizer.step()
        optimizer.zero_grad()


def reference(steps: int) -> tuple[Model, torch.optim.ASGD]:
    model = Model()
    optimizer = torch.optim.ASGD(model.parameters(), foreach=False, **OPTIONS)
    train(model, optimizer, range(steps))
    return model, optimizer


def check(model: nn.Module, optimizer: ShardedASGD, expected: tuple[Model, torch.optim.ASGD], where: object) -> None:
    twins = dict(expected[0].named_parameters())
    for name, param in named_parameters(model).items():
        assert same_bits(whole(param), twins[name]), (where, name)
    full = optimizer.full_state_dict()
    if full:
        check_dense_state(full, expected[1], where)
