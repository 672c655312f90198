"""Kinds of average, each against the float64 mean of the stored iterates by weights that are computed here."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch

from dist_asgd import EMA, PolynomialDecay, ShardedASGD, Tail, Uniform
from dist_asgd.averages import Average
from oracle import Spec, make_parameters, named, random_gradients, same_bits, wide
from ranks import message_of, run_ranks

STEPS, T0 = 25, 3
SPECS = (
    Spec((33,), torch.bfloat16),
    Spec((5, 7), torch.float16),
    Spec((67,)),
    Spec((4, 3), torch.float64),
    Spec((5,), torch.complex64),
)


def power(gamma: float) -> Callable[[int], list[float]]:
    """Shamir and Zhang's weights, by their closed form."""
    return lambda n: [math.exp(math.lgamma(k + gamma) - math.lgamma(k)) for k in range(1, n + 1)]


# By kind: the weights, up to a factor, of n iterates, oldest first.
WEIGHTS: dict[Average, Callable[[int], list[float]]] = {
    Uniform(): lambda n: [1.0] * n,
    Uniform(every=4): lambda n: [float(k % 4 == 0) for k in range(n)],
    EMA(0.9): lambda n: [0.9 ** (n - k) for k in range(1, n + 1)],
    EMA(0.9, warmup=False): lambda n: [0.9 ** (n - 1), *(0.1 * 0.9 ** (n - k) for k in range(2, n + 1))],
    EMA(0.8, every=3): lambda n: [0.8 ** ((n - 1) // 3 - k // 3) * (k % 3 == 0) for k in range(n)],
    PolynomialDecay(8): power(8),
    PolynomialDecay(0.5): power(0.5),
    Tail(0.25, STEPS): lambda n: [0.0] * (n - 6) + [1.0] * 6,
    Tail(1.0, STEPS): lambda n: [1.0] * n,
}


def gradients(specs: Sequence[Spec], step: int) -> list[Any]:
    return random_gradients(specs, 1, step)[0]


def iterates(specs: Sequence[Spec]) -> list[list[torch.Tensor]]:
    """By torch, on masters of those in low precision."""
    params = [torch.nn.Parameter(wide(p.detach())) for p in make_parameters(specs)]
    optimizer = torch.optim.ASGD(params, lr=0.05, foreach=False)
    found = []
    for step in range(STEPS):
        for p, g in zip(params, gradients(specs, step), strict=True):
            p.grad = wide(g)
        optimizer.step()
        found.append([p.detach().clone() for p in params])
    return found


def train(params: Sequence[torch.Tensor], steps: Iterable[int], optimizer: ShardedASGD) -> None:
    for step in steps:
        for p, g in zip(params, gradients(SPECS, step), strict=True):
            p.grad = g
        optimizer.step()


def build(params: list[torch.nn.Parameter], average: Average | None, **options: Any) -> ShardedASGD:
    given = {"lr": 0.05, "t0": T0, "bucket_bytes": 256, "gradients": "reduced", **options}
    return ShardedASGD(named(params), average=average, **given)


def weighted_mean(values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    whole = math.fsum(weights)
    wide = [value.to(torch.promote_types(value.dtype, torch.float64)) for value in values]
    return torch.stack([value * (w / whole) for value, w in zip(wide, weights, strict=True)]).sum(0)


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_kind_is_the_weighted_mean_of_the_iterates(world_size: int) -> None:
    def ranks(rank: int) -> None:
        found = iterates(SPECS)
        taken = found[T0 + 1 :]  # as in torch, step t0 + 2 is the first
        for kind, weights in WEIGHTS.items():
            params = make_parameters(SPECS)
            optimizer = build(params, kind)
            train(params, range(STEPS), optimizer)
            assert all(same_bits(p, q.to(p.dtype)) for p, q in zip(params, found[-1], strict=True))
            state = optimizer.full_state_dict()
            with optimizer.averaged_parameters():
                inside = [p.detach().clone() for p in params]
            for index, p in enumerate(inside if rank == 0 else []):
                ax = state["state"][index]["ax"]
                expected = weighted_mean([values[index] for values in taken], weights(len(taken)))
                assert (ax - expected).abs().max() < 2e-6, (kind, index)
                assert same_bits(p, ax.to(p.dtype)), (kind, index)

    run_ranks(world_size, ranks)


def test_averages_go_on_from_their_state_and_refuse_that_of_others() -> None:
    """With the bits of a run without a stop, which for the uniform one are torch's: tests/test_bits.py."""

    def ranks(rank: int, kind: Average) -> str:
        states, text = [], ""
        for stop in (None, T0 + 8):
            params = make_parameters(SPECS)
            optimizer = build(params, kind)
            train(params, range(stop or STEPS), optimizer)
            if stop is not None:
                state = optimizer.state_dict()
                assert state["param_groups"][0]["average"] == str(kind)
                other = build(make_parameters(SPECS), None)
                if kind == Tail(0.25, STEPS):  # whose average has not begun
                    other.load_state_dict(state)
                else:
                    text = message_of(functools.partial(other.load_state_dict, state), ValueError)
                optimizer = build(params, kind)
                optimizer.load_state_dict(state)
                train(params, range(stop, STEPS), optimizer)
            states.append(optimizer.full_state_dict())
        for index, entry in states[0].get("state", {}).items():
            assert all(same_bits(value, states[1]["state"][index][key]) for key, value in entry.items()), kind
        return text

    kinds = (EMA(0.8, every=3), Tail(0.25, STEPS), PolynomialDecay(8))
    text, _, other = (run_ranks(2, ranks, kind)[0] for kind in kinds)
    assert "EMA(every=3, decay=0.8, warmup=True)" in text and "Uniform(every=1)" in text and "average=" in other
