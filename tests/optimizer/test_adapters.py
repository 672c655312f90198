"""Adapters on a frozen base (LoRA), with activation checkpointing: averages and checkpoints are of the adapters."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from dist_asgd import EMA, Checkpointer, ShardedASGD, ShardedAverages
from tests.support.iterates import averaged
from tests.support.layouts import whole
from tests.support.ranks import run_ranks


class Adapted(nn.Module):
    """A frozen linear layer, and a low-rank one beside it, as PEFT names them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base_layer = nn.Linear(width, width).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(width, 2, bias=False), nn.Linear(2, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Adapted(24) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(checkpoint(layer, x, use_reentrant=False))
        return x


def loss_of(model: nn.Module, step: int) -> Tensor:
    """The same on every rank, so that the mean of the gradients is each of them."""
    x = torch.randn(4, 24, generator=torch.Generator().manual_seed(step))
    return (model(x) - 1).square().mean()


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """The trained parameters after each of four steps, whole."""
    iterates = []
    for step in range(4):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        named = model.named_parameters()
        iterates.append({name: whole(param) for name, param in named if param.requires_grad})
    return iterates


@pytest.mark.parametrize("layout", ["zero", "fsdp"])
def test_only_adapters_are_trained_averaged_and_saved_as_state(layout: str, tmp_path: Path) -> None:
    def ranks(rank: int) -> None:
        twin = Model()
        oracle = torch.optim.ASGD([p for p in twin.parameters() if p.requires_grad], lr=0.5, t0=0, foreach=False)
        expected = trained(twin, oracle)

        model = Model()
        if layout == "fsdp":
            for layer in model.layers:
                fully_shard(layer)
            fully_shard(model)
        optimizer = ShardedASGD(model.named_parameters(), lr=0.5, t0=0, module=model)
        averages = ShardedAverages(model.named_parameters(), EMA(0.5), optimizer=optimizer, module=model)
        found = trained(model, optimizer)
        for mine, torchs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, torchs, rtol=1e-6, atol=1e-6)
        with optimizer.averaged_parameters():
            for param, other in zip(model.parameters(), twin.parameters(), strict=True):
                average = oracle.state[other]["ax"] if other.requires_grad else other
                torch.testing.assert_close(whole(param), average.detach(), rtol=1e-6, atol=1e-6)

        beside = averages.full_state_dict()
        if rank == 0:
            assert beside.keys() == model.state_dict().keys(), "a plain model takes it"
            assert all(torch.equal(beside[name], value) for name, value in averaged(found, EMA(0.5)).items())
        url = Checkpointer(tmp_path).save(4, {"model": model, "optimizer": optimizer, "averages": averages})
        if rank == 0:
            keys = FileSystemReader(url).read_metadata().state_dict_metadata
            assert any("base_layer" in key and key.startswith("model.") for key in keys)
            assert not any("base_layer" in key for key in keys if not key.startswith("model."))

    run_ranks(2, ranks)
