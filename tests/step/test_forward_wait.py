"""module=: whatever reads parameters in a forward finds them complete, though step() returned before they were."""

import gc
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from dist_asgd import ShardedASGD
from dist_asgd.comm import streams
from dist_asgd.comm.collectives import Collectives
from tests.support.oracle import Messenger, model_gradients, reduce_in_rank_order, same_bits, tokens_of
from tests.support.ranks import run_ranks

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
        assert hooked == (0 if world_size == 1 else 4)
        del optimizer
        gc.collect()
        assert not any(m._forward_pre_hooks or m._state_dict_pre_hooks for m in model.modules())

    run_ranks(world_size, ranks)


def test_every_method_waits_for_the_parameters() -> None:
    def ranks(rank: int) -> None:
        model = Messenger(width=4096, depth=3)
        twin = Messenger(width=4096, depth=3)
        optimizer = ShardedASGD(model.named_parameters(), lr=0.3, t0=0, module=model, bucket_bytes=1 << 14)
        reference = torch.optim.ASGD(twin.parameters(), lr=0.3, t0=0, foreach=False)
        reads: list[Callable[[], object]] = [
            optimizer.synchronize,
            optimizer.state_dict,
            optimizer.full_state_dict,
            lambda: model(tokens_of(rank, 0)),
            lambda: optimizer.load_state_dict(optimizer.state_dict()),
        ]
        for step, read in enumerate(reads):
            optimizer.zero_grad()
            (model(tokens_of(rank, step)) ** 2).mean().backward()
            optimizer.step()
            each = [model_gradients(twin, tokens_of(r, step)) for r in range(2)]
            for p, *grads in zip(twin.parameters(), *each, strict=True):
                p.grad = reduce_in_rank_order(grads)
            reference.step()
            read()
            assert all(map(same_bits, model.parameters(), twin.parameters())), step

    run_ranks(2, ranks)


def test_parts_of_the_model_may_be_called_alone() -> None:
    """Overlap must not depend on the whole model's forward being called."""

    def ranks(rank: int) -> None:
        model, twin = Messenger(), Messenger()
        optimizer = ShardedASGD(model.named_parameters(), lr=0.3, t0=0, module=model, bucket_bytes=200)
        reference = torch.optim.ASGD(twin.parameters(), lr=0.3, t0=0, foreach=False)

        def loss(m: Messenger, tokens: torch.Tensor) -> torch.Tensor:
            x = m.embedding(tokens)
            for layer in m.layers:
                x = layer(x)
            return (x**2).mean()

        for step in range(8):
            optimizer.zero_grad()
            loss(model, tokens_of(rank, step)).backward()
            optimizer.step()
            each = [torch.autograd.grad(loss(twin, tokens_of(r, step)), list(twin.parameters())) for r in range(2)]
            for p, *grads in zip(twin.parameters(), *each, strict=True):
                p.grad = reduce_in_rank_order(grads)
            reference.step()
        optimizer.synchronize()
        assert all(map(same_bits, model.parameters(), twin.parameters()))

    run_ranks(2, ranks)


class FakeStream:
    """A stream of a GPU: its events are itself, and it knows for which streams it has waited."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.has_waited_for: set[FakeStream] = set()

    def record_event(self) -> "FakeStream":
        return self

    def wait_event(self, event: "FakeStream") -> None:
        self.has_waited_for.add(event)


def test_every_stream_waits_for_the_one_that_has_completed_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    def ranks(rank: int) -> None:
        first, second, captured = FakeStream(), FakeStream(), FakeStream()
        current, used = first, []
        monkeypatch.setattr(streams, "has_streams", lambda device: True)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current is captured)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, by: used.append((tensor.dtype, by)))
        replicated = distribute_tensor(torch.ones(64), init_device_mesh("cpu", (2,)), [Replicate()])
        for param in (nn.Parameter(torch.ones(64)), nn.Parameter(replicated)):
            optimizer = ShardedASGD([param], wire_dtype=torch.bfloat16)
            param.sum().backward()
            used.clear()
            current = first
            optimizer.step()
            assert (torch.bfloat16, first) in used  # what was received
            for stream in (first, second, captured):
                current = stream
                optimizer.synchronize()
            assert not first.has_waited_for and second.has_waited_for == {first} and not captured.has_waited_for
            second.has_waited_for.clear()

    run_ranks(2, ranks)
