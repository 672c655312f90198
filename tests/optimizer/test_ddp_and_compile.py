"""Models wrapped in DistributedDataParallel or compiled by torch.compile."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_asgd import ShardedASGD
from tests.support.oracle import (
    PLAIN,
    Messenger,
    Pair,
    make_parameters,
    model_gradients,
    random_gradients,
    reduce_in_rank_order,
    same_bits,
    tokens_of,
)
from tests.support.ranks import run_ranks

# DDP


def ddp_run(rank: int, gradients: str, static_graph: bool = False) -> None:
    """DDP averages; torch's ASGD is fed what DDP left in p.grad of a second, equal model."""
    model, twin = Messenger(), Messenger()
    wrapped, wrapped_twin = DistributedDataParallel(model), DistributedDataParallel(twin)
    optimizer = ShardedASGD(wrapped.named_parameters(), lr=0.3, t0=2, gradients=gradients)
    reference = torch.optim.ASGD(twin.parameters(), lr=0.3, t0=2, foreach=False)
    for step in range(8):
        for m, o in ((wrapped, optimizer), (wrapped_twin, reference)):
            o.zero_grad()
            (m(tokens_of(rank, step)) ** 2).mean().backward()
            o.step()
        optimizer.synchronize()
        assert all(map(same_bits, model.parameters(), twin.parameters())), step


@pytest.mark.parametrize("world_size", [2, 3])
def test_under_ddp_with_reduced(world_size: int) -> None:
    run_ranks(world_size, ddp_run, "reduced")


def test_state_dicts_inside_of_a_wrapper_and_of_a_part_are_of_the_whole_step() -> None:
    """The all-gather of the step is under way when they are asked for."""

    def ranks(rank: int) -> None:
        model = nn.Sequential(nn.Linear(256, 256), nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)))
        wrapped = DistributedDataParallel(model)
        optimizer = ShardedASGD(model.named_parameters(), lr=0.1, t0=2, gradients="reduced", module=wrapped)
        for step in range(10):
            wrapped(torch.randn(4, 256)).square().mean().backward()
            optimizer.step()
            asked = model if step % 2 else model[1]
            found = {name: value.clone() for name, value in asked.state_dict().items()}
            optimizer.synchronize()
            assert all(same_bits(value, asked.state_dict()[name]) for name, value in found.items()), step

    run_ranks(2, ranks)


def test_under_ddp_with_local_is_right_and_warns_once() -> None:
    def ranks(rank: int) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ddp_run(rank, "local")
        return [str(w.message) for w in caught]

    each = run_ranks(2, ranks)
    about = [[text for text in texts if "gradients=" in text] for texts in each]
    assert sum(map(len, about)) >= 1 and all(len(texts) <= 1 for texts in about), each
    assert all(
        ("reduced" in text and "DistributedDataParallel" in text) or "DDP" in text for texts in about for text in texts
    )


def test_no_warning_without_ddp() -> None:
    def ranks(rank: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pair = Pair(make_parameters(PLAIN), lr=0.1)
            for step in range(3):
                pair.backward(random_gradients(PLAIN, 2, step))
                pair.step()
                pair.zero_grad()
        pair.check("after three steps")

    run_ranks(2, ranks)


# torch.compile


@pytest.mark.parametrize("overlap", [False, True], ids=["module not given", "module given"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_model(overlap: bool) -> None:
    def ranks(rank: int) -> None:
        model, twin = Messenger(depth=2), Messenger(depth=2)
        optimizer = ShardedASGD(model.named_parameters(), lr=0.3, t0=2, module=model if overlap else None)
        compiled = torch.compile(model, backend="aot_eager")
        reference = torch.optim.ASGD(twin.parameters(), lr=0.3, t0=2, foreach=False)
        for step in range(6):
            optimizer.zero_grad()
            (compiled(tokens_of(rank, step)) ** 2).mean().backward()
            optimizer.step()
            each = [model_gradients(twin, tokens_of(r, step)) for r in range(2)]
            for p, *grads in zip(twin.parameters(), *each, strict=True):
                p.grad = reduce_in_rank_order(grads)
            reference.step()
        optimizer.synchronize()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)

    run_ranks(2, ranks, timeout=120)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_steps_and_compiled_autograd() -> None:
    """Collectives, hooks and the callback at the end of backward stay out of what dynamo traces."""

    def ranks(rank: int) -> None:
        model, twin = (Messenger(width=5, depth=1) for _ in range(2))
        optimizer = ShardedASGD(model.named_parameters(), lr=0.3, t0=0, bucket_bytes=64)
        reference = torch.optim.ASGD(twin.parameters(), lr=0.3, t0=0, foreach=False)

        @torch.compile(backend="eager")
        def finish() -> torch.Tensor:
            norm = optimizer.clip_grad_norm_(math.inf)
            optimizer.step()
            optimizer.zero_grad()
            return norm

        torch._dynamo.config.compiled_autograd = True
        compiled_backward = torch.compile(lambda loss: loss.backward(), backend="eager")
        for step in range(3):
            for p in twin.parameters():
                p.grad = torch.zeros_like(p)
            for part in range(2):  # the second one adds to gradients that are reduced already
                compiled_backward((model(tokens_of(rank, 2 * step + part)) ** 2).mean())
                each = [model_gradients(twin, tokens_of(r, 2 * step + part)) for r in range(2)]
                for p, *grads in zip(twin.parameters(), *each, strict=True):
                    p.grad += reduce_in_rank_order(grads)
            if step == 1:
                torch.compile(optimizer.step, backend="eager")()
                optimizer.zero_grad()
            else:
                norm = torch.nn.utils.get_total_norm([p.grad for p in twin.parameters()])
                torch.testing.assert_close(finish(), norm)
            reference.step()
        assert all(map(same_bits, model.parameters(), twin.parameters()))

    run_ranks(2, ranks, timeout=120)
