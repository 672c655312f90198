"""Gradient accumulation: by shards, and on each rank in no_sync()."""

from typing import Any

import pytest
import torch

from dist_asgd import ShardedASGD
from tests.support.oracle import MIXED, PLAIN, Pair, Spec, backward, make_parameters, named, random_gradients, same_bits
from tests.support.ranks import Sent, run_ranks


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_accumulation_adds_the_reduced_gradients(world_size: int) -> None:
    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(MIXED), lr=0.1, t0=1, bucket_bytes=256)
        for step in range(8):
            for part in range(3):
                pair.backward(random_gradients(MIXED, world_size, 10 * step + part))
            pair.step()
            pair.zero_grad()
            pair.check_parameters(step)
        pair.check()

    run_ranks(world_size, ranks)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_no_sync_accumulates_locally_and_reduces_the_sum(world_size: int) -> None:
    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(MIXED), lr=0.1, t0=1, bucket_bytes=256)
        for step in range(8):
            for part in range(3):
                pair.backward(random_gradients(MIXED, world_size, 10 * step + part), sync=part == 2)
            pair.step()
            pair.zero_grad()
            pair.check_parameters(step)
        pair.check()

    run_ranks(world_size, ranks)


@pytest.mark.parametrize(
    "syncs",
    [(True, False), (True, False, True), (False, False), (False, True, False, True), (True, False, False)],
    ids=str,
)
def test_no_sync_in_any_place(syncs: tuple[bool, ...]) -> None:
    """Also last: what was accumulated locally is reduced by step() at the latest."""

    def ranks(rank: int) -> None:
        for set_to_none in (True, False):
            pair = Pair(make_parameters(PLAIN), lr=0.1, t0=1)
            for step in range(5):
                for part, sync in enumerate(syncs):
                    grads = random_gradients(PLAIN, 2, 10 * step + part, exact=True)  # any order of adding
                    pair.backward(grads, sync=sync)
                pair.step()
                pair.zero_grad(set_to_none)
                pair.check_parameters((step, set_to_none))

    run_ranks(2, ranks)


def test_no_sync_sends_nothing() -> None:
    def ranks(rank: int) -> None:
        params = make_parameters(PLAIN)
        optimizer = ShardedASGD(named(params), lr=0.1)
        with Sent() as sent, optimizer.no_sync():
            backward(params, random_gradients(PLAIN, 2, 0)[rank])
        assert not sent.sizes
        with Sent() as sent:
            backward(params, random_gradients(PLAIN, 2, 0)[rank])
        assert sent.sizes, "nothing is reduced during backward"
        optimizer.step()

    run_ranks(2, ranks)


@pytest.mark.parametrize("by", ["optimizer", "model", "hand"])
def test_a_gradient_made_in_no_sync_and_dropped_does_not_come_back(by: str) -> None:
    def ranks(rank: int) -> None:
        model = torch.nn.ParameterList(make_parameters(PLAIN))
        pair = Pair(list(model), lr=0.1, t0=0)
        for step in range(3):
            pair.backward(random_gradients(PLAIN, 2, 30 + step))
            pair.backward(random_gradients(PLAIN, 2, 60 + step), sync=False)
            pair.drop_gradients(by)
            pair.backward(random_gradients(PLAIN, 2, step))
            pair.step()
            pair.zero_grad()
            pair.check(step)

    run_ranks(2, ranks)


def test_a_gradient_made_in_no_sync_and_set_to_zero_counts_as_zeros() -> None:
    """torch takes a step with zeros, which shrinks the parameters; it does not skip them."""

    def ranks(rank: int) -> None:
        for find_unused in (False, True):
            pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0, lambd=0.1, find_unused_parameters=find_unused)
            for step in range(3):
                pair.backward([[None] * len(PLAIN)] * 2)
                pair.backward(random_gradients(PLAIN, 2, step), sync=False)
                pair.zero_grad(set_to_none=False)
                pair.step()
                pair.check((find_unused, step))
                pair.zero_grad()

    run_ranks(2, ranks)


def test_what_no_sync_added_to_a_reduced_gradient_is_zeroed_with_it() -> None:
    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0, lambd=0.1, find_unused_parameters=True)
        for step in range(3):
            pair.backward(random_gradients(PLAIN, 2, 9 + step))
            pair.backward(random_gradients(PLAIN, 2, step), sync=False)
            pair.zero_grad(set_to_none=False)
            pair.step()
            pair.check(step)
            pair.zero_grad()

    run_ranks(2, ranks)


def test_no_sync_ends_with_an_exception_too() -> None:
    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
        with pytest.raises(KeyError), pair.optimizer.no_sync():
            raise KeyError("from the user's code")
        with Sent() as sent:
            pair.backward(random_gradients(PLAIN, 2, 0))
        assert sent.sizes
        pair.step()
        pair.check()

    run_ranks(2, ranks)


def test_losses_that_each_reach_some_parameters() -> None:
    """Several backward passes before a step; together they reach every parameter."""

    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(MIXED), lr=0.1, t0=1, bucket_bytes=512)
        for step in range(6):
            full = random_gradients(MIXED, 2, step)
            for part in range(3):
                pair.backward([[g if i % 3 == part else None for i, g in enumerate(grads)] for grads in full])
            pair.step()
            pair.zero_grad()
            pair.check_parameters(step)

    run_ranks(2, ranks)


def test_find_unused_parameters_with_accumulation() -> None:
    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=2, find_unused_parameters=True)
        for step in range(12):
            for part in range(3):
                grads = random_gradients(PLAIN, 2, 10 * step + part, missing=0.5, exact=True)
                pair.backward(grads, sync=part != step % 3)
            pair.step()
            pair.zero_grad()
            pair.check_parameters(step)
        pair.check()

    run_ranks(2, ranks)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_gradients_are_readable_inside_every_no_sync(blocks: int) -> None:
    """What a block sees in p.grad is what this rank accumulated so far, as under DDP."""

    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
        for block in range(blocks):
            by_rank = random_gradients(PLAIN, 2, block, exact=True)
            pair.backward(by_rank, sync=False)
            with pair.optimizer.no_sync():
                for p, local in zip(pair.params, pair.oracle.local, strict=True):
                    assert same_bits(p.grad * 1, local[rank]), block
        pair.step()
        pair.check()

    run_ranks(2, ranks, timeout=20)


class FromOneBuffer(torch.autograd.Function):
    """Its gradient lies in memory that it writes again the next time."""

    buffer = torch.zeros(40)

    @staticmethod
    def forward(ctx: Any, p: torch.Tensor, value: float) -> torch.Tensor:
        ctx.value = value
        return p.sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return FromOneBuffer.buffer.fill_(ctx.value), None


def test_gradients_from_memory_that_is_used_again() -> None:
    def ranks(rank: int) -> None:
        (p,) = make_parameters([Spec((40,))])
        (twin,) = make_parameters([Spec((40,))])
        optimizer, reference = ShardedASGD([p], lr=0.1), torch.optim.ASGD([twin], lr=0.1, foreach=False)
        for step in range(3):
            FromOneBuffer.apply(p, 1.0).backward()
            with optimizer.no_sync():
                FromOneBuffer.apply(p, 2.0).backward()
                FromOneBuffer.apply(p, 4.0).backward()
            twin.grad = torch.full((40,), 7.0)
            optimizer.step()
            reference.step()
            optimizer.zero_grad(set_to_none=step == 0)
            optimizer.synchronize()
            assert same_bits(p, twin), step

    run_ranks(2, ranks, timeout=20)


def test_a_gradient_that_waits_through_several_backwards_on_one_rank() -> None:
    """Of a parameter that was just unfrozen, and which the other rank does not use."""

    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0, bucket_bytes=64, find_unused_parameters=True)
        pair.set_requires_grad(3, False)
        for step in range(3):
            pair.backward(random_gradients(PLAIN, 2, step))
            pair.step()
            pair.zero_grad()
        pair.set_requires_grad(3, True)
        for step in range(2):
            by_rank = [list(grads) for grads in random_gradients(PLAIN, 2, 10 + step, exact=True)]
            by_rank[1][3] = None
            pair.backward(by_rank)
        pair.step()
        pair.check()

    run_ranks(2, ranks, timeout=20)
