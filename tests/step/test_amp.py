"""torch.amp.GradScaler, unchanged: an inf on one rank's slice means nobody steps, and the scalers stay equal."""

import contextlib
from collections.abc import Callable, Sequence

import pytest
import torch

from dist_asgd import ShardedASGD
from tests.support.oracle import (
    PLAIN,
    Pair,
    Spec,
    backward,
    make_parameters,
    named,
    random_gradients,
    reduce_in_rank_order,
    same_bits,
)
from tests.support.ranks import run_alone, run_ranks, same_everywhere


def scaled_run(
    world_size: int, gradients: str, bad: dict[int, tuple[int, int, int]], clip: bool, specs: Sequence[Spec] = PLAIN
) -> None:
    """`bad`: step -> (rank, parameter, element) whose gradient is inf."""
    pair = Pair(make_parameters(specs), lr=0.1, t0=1, lambd=0.01, gradients=gradients, bucket_bytes=512)
    ours, theirs = (torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3) for _ in range(2))
    for step in range(10):
        by_rank = random_gradients(specs, world_size, step)
        if step in bad:
            rank, index, element = bad[step]
            by_rank[rank][index].view(-1)[element] = float("inf")  # type: ignore[union-attr]
        for scaler in (ours, theirs):
            scaler.scale(torch.zeros(()))  # a scaler makes its scale at the first loss
        scale = ours.get_scale()
        pair.backward([[g * scale for g in grads if g is not None] for grads in by_rank])
        for p, g in zip(pair.oracle.params, pair.oracle.reduced, strict=True):
            p.grad = g
        if clip:
            ours.unscale_(pair.optimizer)
            theirs.unscale_(pair.oracle.optimizer)
            pair.optimizer.clip_grad_norm_(0.5)
            torch.nn.utils.clip_grad_norm_(pair.oracle.params, 0.5)
        before = [p.detach().clone() for p in pair.params]
        ours.step(pair.optimizer)
        theirs.step(pair.oracle.optimizer)
        ours.update()
        theirs.update()
        pair.zero_grad()
        pair.optimizer.synchronize()
        assert ours.get_scale() == theirs.get_scale(), step
        assert ours.state_dict() == theirs.state_dict(), step
        if step in bad:
            assert all(map(same_bits, pair.params, before)), f"a rank stepped on an inf, step {step}"
        if clip:
            for p, twin in zip(pair.params, pair.oracle.params, strict=True):
                torch.testing.assert_close(p.detach(), twin.detach(), rtol=1e-5, atol=1e-6)
                assert world_size == 1 or same_everywhere(p)
        else:
            pair.check(step)


# The first and the last element of the last and the first parameter: a slice of one rank each.
BAD = {2: (0, 4, 98), 3: (1, 0, 0), 7: (1, 3, 128)}


@pytest.mark.parametrize("clip", [False, True], ids=["step", "unscale_ and clip"])
@pytest.mark.parametrize(
    ("world_size", "gradients"), [(2, "local"), (3, "local"), (4, "local"), (2, "reduced"), (3, "reduced")]
)
def test_grad_scaler(world_size: int, gradients: str, clip: bool) -> None:
    run_ranks(world_size, lambda rank: scaled_run(world_size, gradients, BAD, clip))


@pytest.mark.parametrize("clip", [False, True], ids=["step", "unscale_ and clip"])
def test_grad_scaler_on_one_rank(clip: bool) -> None:
    bad = {step: (0, index, element) for step, (_, index, element) in BAD.items()}
    run_ranks(1, lambda rank: scaled_run(1, "local", bad, clip))
    run_alone(scaled_run, 1, "local", bad, clip)


def test_ranks_that_own_nothing_follow_the_others() -> None:
    """Three elements on four ranks: most ranks have no slice to look at."""
    run_ranks(4, lambda rank: scaled_run(4, "local", {1: (2, 0, 1), 4: (3, 0, 2)}, False, [Spec((3,))]))


def test_scaler_with_frozen_and_unused_parameters_and_accumulation() -> None:
    def ranks(rank: int) -> None:
        params, twins = make_parameters(PLAIN), make_parameters(PLAIN)
        params[1].requires_grad_(False)
        optimizer = ShardedASGD(named(params), lr=0.1, t0=0, find_unused_parameters=True)
        reference = torch.optim.ASGD(twins, lr=0.1, t0=0, foreach=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for step in range(6):
            total: list[torch.Tensor | None] = [None] * len(PLAIN)
            for part in range(2):
                by_rank = random_gradients(PLAIN, 2, 10 * step + part, missing=0.4, exact=True)
                backward(params, [None if g is None else g * scaler.get_scale() for g in by_rank[rank]])
                for index, grads in enumerate(zip(*by_rank, strict=True)):
                    mean = reduce_in_rank_order(grads)
                    if mean is not None and index != 1:
                        total[index] = mean if total[index] is None else total[index] + mean
            for twin, g in zip(twins, total, strict=True):
                twin.grad = g
            if any(g is not None for g in total):
                scaler.scale(torch.zeros(()))
                scaler.step(optimizer)
                scaler.update()
                reference.step()
            optimizer.zero_grad()
            assert all(map(same_bits, params, twins)), step

    run_ranks(2, ranks)


def test_autocast_with_the_scaler_trains() -> None:
    def ranks(rank: int) -> None:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        optimizer = ShardedASGD(model.named_parameters(), lr=0.1, lambd=0.0, module=model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(rank))
        losses = []
        for _ in range(50):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = ((model(x) - x.sum(1, keepdim=True)) ** 2).mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        assert losses[-1] < 0.2 * losses[0], losses

    run_ranks(2, ranks)


def scaled_step(pair: Pair, scaler: torch.amp.GradScaler, reference: torch.amp.GradScaler) -> None:
    """One step of both, and that they and their scalers agree."""
    for p, g in zip(pair.oracle.params, pair.oracle.reduced, strict=True):
        p.grad = g
    scaler.step(pair.optimizer)
    reference.step(pair.oracle.optimizer)
    scaler.update()
    reference.update()
    pair.zero_grad()
    assert scaler.state_dict() == reference.state_dict()
    pair.check()


def two_scalers() -> list[torch.amp.GradScaler]:
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0) for _ in range(2)]
    for scaler in scalers:
        scaler.scale(torch.zeros(()))
    return scalers


@pytest.mark.parametrize("find_unused", [False, True])
def test_scaler_with_ranks_that_ran_different_numbers_of_backwards(find_unused: bool) -> None:
    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0, find_unused_parameters=find_unused)
        scalers = two_scalers()
        for step in range(3):
            by_rank = random_gradients(PLAIN, 2, step)
            pair.backward(by_rank)
            pair.oracle.backward([by_rank[0], [None] * len(PLAIN)])
            if rank == 0:
                backward(pair.params, by_rank[0])
            scaled_step(pair, *scalers)

    run_ranks(2, ranks, timeout=20)


def test_scaler_with_a_group_without_elements_first() -> None:
    def ranks(rank: int) -> None:
        groups = [{"params": make_parameters([Spec((0,))])}, {"params": make_parameters(PLAIN)}]
        pair = Pair(groups, lr=0.1, t0=0)
        specs = [Spec((0,)), *PLAIN]
        scaler = two_scalers()[0]
        for step in range(4):
            by_rank = random_gradients(specs, 2, step)
            if step in (1, 2):  # the first element, then the last: on one rank's slice only
                by_rank[1][1 if step == 1 else 5].view(-1)[0 if step == 1 else -1] = float("inf")  # type: ignore[union-attr]
            before = [p.detach().clone() for p in pair.params]
            pair.backward([[g * scaler.get_scale() for g in grads if g is not None] for grads in by_rank])
            scaler.step(pair.optimizer)
            scaler.update()
            pair.zero_grad()
            stepped = not same_bits(pair.params[1], before[1])
            assert stepped == (step not in (1, 2)) == (not same_bits(pair.params[5], before[5])), step
        assert scaler.get_scale() == 1.0

    run_ranks(2, ranks, timeout=20)


@pytest.mark.parametrize("where", ["no_sync", "a bucket that was just unfrozen"])
def test_the_scaler_sees_an_inf_in_gradients_that_are_not_reduced_yet(where: str) -> None:
    def ranks(rank: int) -> None:
        specs = [Spec((64,)), Spec((64,), torch.float64)]
        params = make_parameters(specs)
        optimizer = ShardedASGD(named(params), lr=0.1, t0=0)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.zeros(()))
        unfrozen = where != "no_sync"
        params[1].requires_grad_(not unfrozen)
        for step in range(4):
            by_rank = random_gradients(specs, 2, step)
            grads = [g * scaler.get_scale() for g in by_rank[rank] if g is not None]
            if step == 1:
                params[1].requires_grad_(True)
                grads[1][0] = float("inf") if rank == 0 else 1.0
            before = [p.detach().clone() for p in params]
            with contextlib.nullcontext() if unfrozen else optimizer.no_sync():
                backward(params, grads)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert all(map(same_bits, params, before)) == (step == 1), step
            assert all(map(same_everywhere, params))
            assert scaler.get_scale() == (4.0 if step == 0 else 2.0)

    run_ranks(2, ranks, timeout=20)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_inf_of_an_earlier_step_is_forgotten(world_size: int) -> None:
    """Also by model.zero_grad(), which the optimizer does not see, and when nothing is reduced in between."""

    def ranks(rank: int) -> None:
        model = torch.nn.Linear(10, 10, bias=False)
        optimizer = ShardedASGD(model.named_parameters(), lr=0.1, module=model)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(5):
            model.zero_grad()
            x = torch.full((2, 10), float("inf") if step == 1 else 1.0)
            before = model.weight.detach().clone()
            with optimizer.no_sync() if step > 1 else contextlib.nullcontext():
                scaler.scale(model(x).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.synchronize()
            assert same_bits(model.weight, before) == (step == 1), step
            assert scaler.get_scale() == (4.0 if step == 0 else 2.0)

    run_ranks(world_size, ranks, timeout=20)


ALIASES = {
    "one gradient for two parameters": lambda a, b: ((a + b) * torch.ones_like(a)).sum(),
    "an expanded gradient": lambda a, b: a.sum() + b.sum(),
}


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("loss", ALIASES.values(), ids=ALIASES)
def test_gradients_that_share_memory_are_unscaled_once(loss: Callable[..., torch.Tensor], set_to_none: bool) -> None:
    """Autograd may hand one tensor to several parameters; torch's p.grad are copies then, and so are ours."""

    def ranks(rank: int) -> None:
        a, b = make_parameters([Spec((40,)), Spec((40,))])
        twins = make_parameters([Spec((40,)), Spec((40,))])
        optimizer, reference = ShardedASGD([a, b], lr=0.5), torch.optim.ASGD(twins, lr=0.5, foreach=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(4):
            with optimizer.no_sync() if step % 2 else contextlib.nullcontext():
                scaler.scale(loss(a, b)).backward()
            loss(*twins).backward()
            scaler.step(optimizer)
            scaler.update()
            reference.step()
            optimizer.zero_grad(set_to_none)
            reference.zero_grad()
            optimizer.synchronize()
            assert same_bits(a, twins[0]) and same_bits(b, twins[1]), step

    run_ranks(2, ranks, timeout=20)
