"""module=: whatever reads parameters in a forward finds them complete, though step() returned before they were."""

import gc
import time
from typing import Any

import pytest
import torch
from torch import nn

from dist_asgd import ShardedASGD
from dist_asgd.collectives import Collectives
from oracle import same_bits
from ranks import run_ranks

WIDTH = 16
LATE = 0.1  # seconds by which rank 1 enters every all-gather later than rank 0


class ReadsItsChild(nn.Module):
    """Uses its child's parameters without calling it, and has none of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.proj.weight, self.proj.bias)


class ReadsItsGrandchild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = ReadsItsChild()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.child.proj.weight)


class Attention(nn.Module):
    """MultiheadAttention reads the weight of its out_proj without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


def transformer() -> nn.Module:
    """Out of training it takes a fast path, which calls none of its children."""
    return nn.TransformerEncoderLayer(WIDTH, 4, 32, dropout=0.0, batch_first=True)


MODELS: dict[str, Any] = {
    "a child's weight": ReadsItsChild,
    "a grandchild's weight": ReadsItsGrandchild,
    "a child's weight, in a list": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), ReadsItsChild()),
    "attention": Attention,
    "attention, in a list": lambda: nn.Sequential(Attention(), Attention()),
    "transformer": transformer,
    "transformer, in a list": lambda: nn.Sequential(transformer(), transformer()),
}


def hold_up_gathers(rank: int) -> None:
    """From now on rank 0 sees the parameters of rank 1 arrive late."""
    start_gather = Collectives.start_gather

    def late(self: Collectives, *args: Any) -> Any:
        if rank == 1:
            time.sleep(LATE)
        return start_gather(self, *args)

    Collectives.start_gather = late  # type: ignore[method-assign]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("what", MODELS)
def test_a_forward_finds_complete_parameters(what: str, mode: str) -> None:
    def ranks(rank: int) -> None:
        torch.manual_seed(0)
        model = MODELS[what]()
        optimizer = ShardedASGD(model.named_parameters(), lr=0.1, module=model, find_unused_parameters=True)
        x = torch.randn(2, 3, WIDTH)
        hold_up_gathers(rank)
        for step in range(2):
            model.train()
            (model(x) ** 2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            early = [p.detach().clone() for p in model.parameters()]
            model.train(mode == "train")
            with torch.set_grad_enabled(mode == "train"):
                output = model(x)
                optimizer.synchronize()
                assert same_bits(output, model(x)), f"step {step}: the forward used parameters of the step before"
            assert rank == 1 or not all(map(same_bits, early, model.parameters())), "there was nothing to wait for"

    run_ranks(2, ranks, timeout=20)


class Normed(nn.Module):
    """Its weight is made from parameters by a pre-hook of another, registered before the optimizer was built."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.direction = nn.Parameter(torch.ones(WIDTH, WIDTH))
        self.register_forward_pre_hook(lambda module, _: setattr(module, "made", module.direction * 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) @ self.made


def test_other_hooks_find_complete_parameters() -> None:
    def ranks(rank: int) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(Normed(), Normed())
        optimizer = ShardedASGD(model.named_parameters(), lr=0.1, module=model)
        x = torch.randn(2, 3, WIDTH)
        hold_up_gathers(rank)
        for _ in range(2):
            (model(x) ** 2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                output = model(x)
                optimizer.synchronize()
                assert same_bits(output, model(x))

    run_ranks(2, ranks, timeout=20)


@pytest.mark.parametrize("world_size", [1, 2])
def test_hooks_are_there_only_while_they_have_something_to_wait_for(world_size: int) -> None:
    def ranks(rank: int) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        optimizer = ShardedASGD(model.named_parameters(), lr=0.1, module=model)
        hooked = sum(len(m._forward_pre_hooks) + len(m._state_dict_pre_hooks) for m in model.modules())
        assert hooked == (0 if world_size == 1 else 3)
        del optimizer
        gc.collect()
        assert not any(m._forward_pre_hooks or m._state_dict_pre_hooks for m in model.modules())

    run_ranks(world_size, ranks)
