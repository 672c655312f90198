"""`ShardedASGD.metrics`: the numbers of torch.optim.ASGD, and distances to whole averages, under every layout."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dist_asgd import EMA, ShardedASGD, Tail, Uniform
from tests.support.failures import one_message, quick_message
from tests.support.layouts import Model, backward, build, give_gradients, named_parameters
from tests.support.oracle import PLAIN, make_parameters, named
from tests.support.ranks import run_alone, run_ranks

OPTIONS: dict[str, Any] = {"lr": 0.05, "lambd": 1e-2, "t0": 2}


def norm_of(tensors: list[Tensor]) -> float:
    return torch.linalg.vector_norm(torch.cat([tensor.detach().double().flatten() for tensor in tensors])).item()


def check_layout(rank: int, layout: str, **options: Any) -> None:
    model, optimizer = build(layout, **OPTIONS, **options)
    twin = Model()
    params = list(twin.parameters())
    oracle = torch.optim.ASGD(params, foreach=False, **OPTIONS)
    assert optimizer.metrics(distance=True) == {
        "step": 0,
        "lr": 0.05,
        "eta": torch.tensor(0.05).item(),
        "mu": 1.0,
        "averaging": 0,
        "distance": 0.0,
    }
    for step in range(5):
        for each, of_model in ((optimizer, named_parameters(model)), (oracle, dict(twin.named_parameters()))):
            give_gradients(of_model, step)
            each.step()
            each.zero_grad()
        found, state = optimizer.metrics(distance=True), oracle.state[params[0]]
        distance = found.pop("distance")
        assert found == optimizer.metrics()
        assert found == {
            "step": step + 1,
            "lr": 0.05,
            "eta": state["eta"].item(),
            "mu": state["mu"].item(),
            "averaging": int(step > 2),
        }
        assert all(type(found[key]) is int for key in ("step", "averaging"))
        expected = norm_of([p.double() - oracle.state[p]["ax"].double() for p in params])
        assert (expected > 0) == (step > 3)  # the average begins as the parameters of step 4
        assert math.isclose(distance, expected, rel_tol=1e-12), (distance, expected)


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [("zero", 1), ("zero", 3), ("fsdp", 3), ("hsdp", 4), ("tp", 2)],
)
def test_the_numbers_are_those_of_torch(layout: str, world_size: int) -> None:
    run_ranks(world_size, check_layout, layout)


def test_replicas_that_share_no_state_count_once() -> None:
    run_ranks(2, lambda rank: check_layout(rank, "hsdp", shard_replicas=False))


def test_several_averages_groups_and_masters() -> None:
    kinds = {"mean": Uniform(), "fast": EMA(0.5), "tail": Tail(0.5, steps=100)}

    def ranks(rank: int) -> None:
        params = [torch.nn.Parameter(torch.ones(70, dtype=torch.bfloat16)), torch.nn.Parameter(torch.ones(3, 5))]
        groups = [{"params": [("low", params[0])]}, {"params": [("high", params[1])], "lr": torch.tensor(0.5)}]
        optimizer = ShardedASGD(groups, lr=0.25, lambd=0, t0=0, average=kinds)
        iterates = []
        for step in range(4):
            if step == 3:
                params[1].requires_grad_(False)
            for p in params:
                p.grad = torch.full_like(p, 1 / 64) if p.requires_grad else None
            optimizer.step()
            state = optimizer.full_state_dict()["state"] if rank == 0 else optimizer.full_state_dict()
            iterates.append(state)
        found = optimizer.metrics(distance=True)
        assert optimizer.metrics().items() <= found.items()
        assert found.keys() == {
            *("step", "lr", "eta", "step/1", "lr/1", "eta/1", "averaging"),
            *(f"mu/{name}{group}" for name in kinds for group in ("", "/1")),
            *(f"distance/{name}" for name in kinds),
        }
        assert (found["step"], found["step/1"], found["lr"], found["lr/1"]) == (4, 3, 0.25, 0.5)
        for group, steps in (("", 4), ("/1", 3)):
            for name, kind in kinds.items():
                assert found[f"mu/{name}{group}"] == torch.tensor(kind.mu(steps, 0)).item()
        assert found["averaging"] == 1 and found["distance/tail"] == 0
        if rank == 0:
            low, high = state[0], state[1]
            for name, key in (("mean", "ax"), ("fast", "ax_fast")):
                parts = [low["master"].double() - low[key].double(), params[1].double() - high[key].double()]
                assert math.isclose(found[f"distance/{name}"], norm_of(parts), rel_tol=1e-12)

    run_ranks(2, ranks)


def test_the_norm_is_the_one_that_clipping_returned_and_nobody_waits_for_it() -> None:
    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    model, (optimizer) = Model(), None
    optimizer = ShardedASGD(model.named_parameters(), lr=0.1)
    for step in range(2):
        model(torch.ones(2, 7) * (step + 1)).square().mean().backward()
        assert ("grad_norm" in optimizer.metrics()) == bool(step)
        with Ops():
            norm = optimizer.clip_grad_norm_(0.5)
            optimizer.step()
        assert "aten._local_scalar_dense.default" not in seen and seen
        assert optimizer.metrics()["grad_norm"] == norm.item() > 0.5
        optimizer.zero_grad()


def test_one_rank_alone_may_ask_for_all_but_the_distance() -> None:
    def ranks(rank: int) -> str:
        params = make_parameters(PLAIN)
        optimizer = ShardedASGD(named(params), lr=0.1, t0=0)
        if rank == 0:
            assert optimizer.metrics()["step"] == 0
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        text = quick_message(lambda: optimizer.metrics(distance=True) if rank == 0 else optimizer.full_state_dict())
        with optimizer.averaged_parameters():
            assert optimizer.metrics()["step"] == 1
            assert "averaged_parameters" in quick_message(lambda: optimizer.metrics(distance=True), RuntimeError)
        assert optimizer.metrics(distance=True)["step"] == 1
        return text

    one_message(run_ranks(2, ranks), "metrics(distance=True)", "full_state_dict()", "rank 0", "rank 1")


def test_a_training_under_fsdp_goes_on_with_the_same_bits() -> None:
    """Also where distances are asked for between a forward and its backward."""

    def ranks(rank: int) -> None:
        runs = []
        for asks in (False, True):
            model, optimizer = build("fsdp", lr=0.05, t0=1)
            for step in range(4):
                backward(model, "fsdp", step)
                if asks:
                    optimizer.metrics(distance=True)
                optimizer.step()
                if asks:
                    optimizer.metrics(distance=True)
                optimizer.zero_grad()
            runs.append([param.to_local().clone() for param in model.parameters()])
        assert all(map(torch.equal, *runs))

    run_ranks(2, ranks)


def test_before_any_step_and_without_parameters() -> None:
    def alone() -> None:
        optimizer = ShardedASGD([{"params": []}], lr=0.125, average={"a": Uniform(), "b": EMA(0.5)})
        found = optimizer.metrics(distance=True)
        assert found == {
            **dict.fromkeys(("step", "averaging", "distance/a", "distance/b"), 0),
            **dict.fromkeys(("mu/a", "mu/b"), 1.0),
            **dict.fromkeys(("lr", "eta"), 0.125),
        }

    run_alone(alone)
