"""gradients="local": what backward leaves behind, accumulation, missing gradients, order; clipping; DDP; compiling."""

import gc
import random
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dist_asgd import ShardedASGD
from oracle import (
    MIXED,
    PLAIN,
    Messenger,
    Pair,
    Spec,
    backward,
    make_parameters,
    model_gradients,
    named,
    random_gradients,
    reduce_in_rank_order,
    same_bits,
    tokens_of,
)
from ranks import message_of, run_alone, run_ranks, same_everywhere

# What p.grad is after backward


def test_backward_leaves_a_piece_and_frees_the_gradient() -> None:
    def ranks(rank: int) -> None:
        specs = [Spec((300, 100)), Spec((50,)), Spec((100, 30))]
        params = make_parameters(specs)
        full: list[weakref.ref[torch.Tensor]] = []
        for p in params:  # registered first, so called before the optimizer's
            p.register_post_accumulate_grad_hook(lambda p: full.append(weakref.ref(p.grad.untyped_storage())))
        optimizer = ShardedASGD(named(params), lr=0.1, bucket_bytes=1 << 16)
        backward(params, random_gradients(specs, 3, 0)[rank])
        gc.collect()
        assert len(full) == 3 and all(storage() is None for storage in full), "a whole gradient is still in memory"
        assert all(p.grad is not None and type(p.grad) is not torch.Tensor for p in params)
        assert all(p.grad.shape == p.shape and p.grad.dtype == p.dtype for p in params)
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in params)

    run_ranks(3, ranks)


def test_the_stand_in_refuses_what_it_cannot_answer() -> None:
    def ranks(rank: int) -> None:
        params = make_parameters(PLAIN)
        optimizer = ShardedASGD(named(params), lr=0.1)
        backward(params, random_gradients(PLAIN, 2, 0)[rank])
        grad = params[3].grad
        assert grad is not None
        assert isinstance(grad, torch.Tensor) and not grad.is_sparse and grad.device == params[3].device
        for wrong in (
            lambda: grad + 1,
            lambda: grad.norm(),
            lambda: grad.sum().item(),
            lambda: grad.view(-1)[0],
            lambda: grad.add_(torch.ones(257)),
            lambda: torch.nn.utils.clip_grad_norm_(params, 1.0),
            lambda: dist.all_reduce(grad),
        ):
            text = message_of(wrong, RuntimeError, TypeError, NotImplementedError)
            assert "gradient" in text.lower() and ("piece" in text or "shard" in text or "ShardedASGD" in text), text
        text = message_of(
            lambda: torch.nn.utils.clip_grad_norm_(params, 1.0), RuntimeError, TypeError, NotImplementedError
        )
        assert "clip_grad_norm_" in text, text
        assert "grad" in repr(grad).lower() or "shard" in repr(grad).lower()  # can be printed
        optimizer.step()

    run_ranks(2, ranks)


def test_none_by_hand_on_every_rank_skips_the_parameter() -> None:
    def ranks(rank: int) -> None:
        params = make_parameters(PLAIN)
        pair = Pair(params, lr=0.1, t0=0, find_unused_parameters=True)
        for step in range(4):
            pair.backward(random_gradients(PLAIN, 2, step))
            params[step % 5].grad = None
            pair.oracle.reduced[step % 5] = None
            pair.step()
            pair.zero_grad()
            pair.check(step)

    run_ranks(2, ranks)


# Accumulation


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


class Sent(TorchDispatchMode):
    """Elements handed to collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            leaves = torch.utils._pytree.tree_leaves((args, kwargs))
            self.elements += max(t.numel() for t in leaves if isinstance(t, torch.Tensor))
        return func(*args, **(kwargs or {}))


def test_no_sync_sends_nothing() -> None:
    def ranks(rank: int) -> None:
        params = make_parameters(PLAIN)
        optimizer = ShardedASGD(named(params), lr=0.1)
        with Sent() as sent, optimizer.no_sync():
            backward(params, random_gradients(PLAIN, 2, 0)[rank])
        assert sent.elements == 0
        with Sent() as sent:
            backward(params, random_gradients(PLAIN, 2, 0)[rank])
        assert sent.elements > 0, "nothing is reduced during backward"
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
            drop(pair, by)
            pair.backward(random_gradients(PLAIN, 2, step))
            pair.step()
            pair.zero_grad()
            pair.check(step)

    run_ranks(2, ranks)


def drop(pair: Pair, by: str) -> None:
    """The three ways to drop all gradients."""
    pair.oracle.zero_grad()
    if by == "optimizer":
        pair.optimizer.zero_grad()
    elif by == "model":
        torch.nn.ParameterList(pair.params).zero_grad()
    else:
        for p in pair.params:
            p.grad = None


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
        assert sent.elements > 0
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


# The order of events differs between ranks


def test_ranks_may_finish_their_gradients_in_any_order_and_at_any_time() -> None:
    def ranks(rank: int) -> None:
        specs = [Spec((50,))] * 12
        params = make_parameters(specs)
        pair = Pair(params, lr=0.1, t0=1, bucket_bytes=256)
        chance = random.Random(rank)
        for step in range(10):
            by_rank = random_gradients(specs, 3, step)
            pair.oracle.backward(by_rank)
            order = list(range(12))
            chance.shuffle(order)
            terms = []
            for index in order:
                term = (params[index] * by_rank[rank][index]).sum()
                term.register_hook(lambda g: time.sleep(chance.random() * 1e-3))
                terms.append(term)
            torch.autograd.backward(terms)
            pair.step()
            pair.zero_grad()
            pair.check_parameters(step)

    run_ranks(3, ranks)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_model_may_use_its_layers_in_another_order_than_it_registered_them(world_size: int) -> None:
    def ranks(rank: int) -> None:
        model, twin = Messenger(depth=6), Messenger(depth=6)

        def loss(m: Messenger, tokens: torch.Tensor) -> torch.Tensor:
            x = m.embedding(tokens)
            for index in (3, 0, 5, 1, 4, 2, 3):
                x = m.layers[index](x)
            return (x**2).mean()

        optimizer = ShardedASGD(model.named_parameters(), lr=0.3, t0=0, bucket_bytes=200, module=model)
        reference = torch.optim.ASGD(twin.parameters(), lr=0.3, t0=0, foreach=False)
        for step in range(10):
            optimizer.zero_grad()
            loss(model, tokens_of(rank, step)).backward()
            optimizer.step()
            each = [
                torch.autograd.grad(loss(twin, tokens_of(r, step)), list(twin.parameters())) for r in range(world_size)
            ]
            for p, *grads in zip(twin.parameters(), *each, strict=True):
                p.grad = reduce_in_rank_order(grads)
            reference.step()
        optimizer.synchronize()
        assert all(map(same_bits, model.parameters(), twin.parameters()))

    run_ranks(world_size, ranks)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    def ranks(rank: int) -> None:
        model, twin = Messenger(), Messenger()
        optimizer = ShardedASGD(model.named_parameters(), lr=0.3, t0=0, bucket_bytes=256)
        reference = torch.optim.ASGD(twin.parameters(), lr=0.3, t0=0, foreach=False)
        for step in range(6):
            optimizer.zero_grad()
            x = model.embedding(tokens_of(rank, step))
            for layer in model.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant)
            (x**2).mean().backward()
            optimizer.step()
            each = [model_gradients(twin, tokens_of(r, step)) for r in range(2)]
            for p, *grads in zip(twin.parameters(), *each, strict=True):
                p.grad = reduce_in_rank_order(grads)
            reference.step()
            assert all(map(same_bits, model.parameters(), twin.parameters())), step

    run_ranks(2, ranks)


def test_a_backward_that_failed_leaves_nothing_behind() -> None:
    class Boom(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise ArithmeticError("in the middle of backward")

    def ranks(rank: int) -> None:
        params = make_parameters(PLAIN)
        pair = Pair(params, lr=0.1, t0=0, bucket_bytes=256)
        for step in range(3):
            grads = random_gradients(PLAIN, 2, 70 + step)[rank]
            x = Boom.apply(params[0] * grads[0]).sum()
            for p, g in zip(params[1:], grads[1:], strict=True):
                x = x * 1.0 + (p * g).sum()
            with pytest.raises(ArithmeticError):
                x.backward()
            pair.zero_grad()
            pair.backward(random_gradients(PLAIN, 2, step))
            pair.step()
            pair.zero_grad()
            pair.check(step)

    run_ranks(2, ranks)


class FailsOn(torch.autograd.Function):
    """Passes its gradient on, or fails in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, fails: bool) -> torch.Tensor:
        ctx.fails = fails
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        if ctx.fails:
            raise ArithmeticError("in the middle of backward")
        return grad, None


@pytest.mark.parametrize("by", ["optimizer", "model", "hand"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_backward_that_failed_on_one_rank_does_not_take_the_next_gradients_along(cut: int, by: str) -> None:
    """`cut` gradients of four, each a bucket of its own, were there when it failed."""

    def ranks(rank: int) -> None:
        specs = [Spec((50,))] * 4
        pair = Pair(make_parameters(specs), lr=0.1, t0=0, bucket_bytes=200)
        for step in range(3):
            total = torch.zeros((), requires_grad=True)
            for index, (p, g) in enumerate(zip(pair.params, random_gradients(specs, 2, 70 + step)[rank], strict=True)):
                if index == 4 - cut:
                    total = FailsOn.apply(total, rank == 1)
                total = total + (p * g).sum()
            if rank == 1:
                with pytest.raises(ArithmeticError):
                    total.backward()
            else:
                total.backward()
            drop(pair, by)
            pair.backward(random_gradients(specs, 2, step))
            pair.step()
            pair.zero_grad()
            pair.check(step)

    run_ranks(2, ranks)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_a_backward_that_makes_a_graph_of_its_own() -> None:
    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0, bucket_bytes=256)
        for step in range(3):
            for part in range(2):  # the second one accumulates
                by_rank = random_gradients(PLAIN, 2, 10 * step + part)
                pair.oracle.backward(by_rank)
                terms = [(p * g).sum() for p, g in zip(pair.params, by_rank[rank], strict=True)]
                torch.autograd.backward(terms, create_graph=True)
            assert not any(p.grad.requires_grad for p in pair.params)
            pair.step()
            pair.zero_grad()
            pair.check(step)

    run_ranks(2, ranks)


COLLECTIVE: dict[str, Callable[[ShardedASGD], object]] = {
    "averaged_parameters": lambda optimizer: enter_and_leave(optimizer),
    "full_state_dict": lambda optimizer: optimizer.full_state_dict(),
    "add_param_group": lambda optimizer: optimizer.add_param_group(
        {"params": [("frozen", torch.nn.Parameter(torch.ones(3), requires_grad=False))]}
    ),
    "clip_grad_norm_": lambda optimizer: optimizer.clip_grad_norm_(1e9),
    "load_state_dict": lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "synchronize": lambda optimizer: optimizer.synchronize(),
}


def enter_and_leave(optimizer: ShardedASGD) -> None:
    with optimizer.averaged_parameters():
        pass


@pytest.mark.parametrize("what", COLLECTIVE)
def test_ranks_that_ran_different_numbers_of_backwards_meet_in_any_collective_call(what: str) -> None:
    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
        for step in range(2):
            pair.backward(random_gradients(PLAIN, 2, step))
            pair.step()
            pair.zero_grad()
        by_rank = random_gradients(PLAIN, 2, 5)
        pair.backward(by_rank)
        pair.oracle.backward([by_rank[0], [None] * len(PLAIN)])
        if rank == 0:  # one micro-batch more
            backward(pair.params, by_rank[0])
        COLLECTIVE[what](pair.optimizer)
        pair.step()
        pair.check_parameters()

    run_ranks(2, ranks, timeout=20)


def test_autograd_grad_and_retain_graph_do_not_disturb() -> None:
    def ranks(rank: int) -> None:
        params = make_parameters(PLAIN)
        pair = Pair(params, lr=0.1, t0=0)
        for step in range(4):
            by_rank = random_gradients(PLAIN, 2, step, exact=True)
            loss = sum((p * g).sum() for p, g in zip(params, by_rank[rank], strict=True))
            assert isinstance(loss, torch.Tensor)
            torch.autograd.grad(loss, params, retain_graph=True)
            assert all(p.grad is None for p in params)
            loss.backward(retain_graph=True)
            loss.backward()
            pair.oracle.backward(by_rank)
            pair.oracle.backward(by_rank)
            pair.step()
            pair.zero_grad()
            pair.check_parameters(step)

    run_ranks(2, ranks)


# Missing gradients


@pytest.mark.parametrize("world_size", [2, 3])
def test_find_unused_parameters_takes_the_union(world_size: int) -> None:
    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(MIXED), lr=0.1, t0=2, lambd=0.1, bucket_bytes=256, find_unused_parameters=True)
        for step in range(20):
            pair.backward(random_gradients(MIXED, world_size, step, missing=0.6))
            pair.step()
            pair.zero_grad()
            pair.check_parameters(step)
        nobody = [[None] * len(MIXED)] * world_size
        pair.backward(nobody)
        pair.step()  # nobody has any gradient
        pair.check()

    run_ranks(world_size, ranks)


def test_a_rank_without_any_gradient_joins_when_it_steps() -> None:
    def ranks(rank: int) -> None:
        for bucket_bytes, passes in ((25 * 2**20, [1, 2]), (256, [1])):
            pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0, find_unused_parameters=True, bucket_bytes=bucket_bytes)
            for step, number in enumerate([*passes, 1]):
                for part in range(number):
                    grads = random_gradients(PLAIN, 2, 10 * step + part, exact=True)
                    pair.backward([grads[0], [None] * len(PLAIN)] if step < len(passes) else grads)
                pair.step()
                pair.zero_grad()
                pair.check((bucket_bytes, step))

    run_ranks(2, ranks)


def test_zeroing_gradients_where_a_rank_ran_no_backward() -> None:
    """zero_grad() waits for nobody; step() says that what was zeroed came from a backward that a rank did not run."""

    def ranks(rank: int) -> str:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0, lambd=0.1, find_unused_parameters=True)
        for step in range(2):
            pair.backward(random_gradients(PLAIN, 2, step))
            pair.step()
            pair.zero_grad()
        if rank == 0:
            backward(pair.params, random_gradients(PLAIN, 2, 7)[0])
        pair.optimizer.zero_grad(set_to_none=False)
        text = message_of(pair.optimizer.step, RuntimeError)
        pair.check("after the refusal")
        pair.zero_grad()
        for step in range(2):
            pair.backward(random_gradients(PLAIN, 2, step))
            pair.step()
            pair.zero_grad()
            pair.check(step)
        return text

    a, b = run_ranks(2, ranks, timeout=20)
    assert a == b and "different backwards" in a


def test_zeroing_a_gradient_whose_reduction_is_under_way() -> None:
    """Of one parameter of a bucket: the others keep theirs."""

    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0, lambd=0.1)
        for step in range(4):
            if step % 2:  # the zeros then are added to
                pair.backward(random_gradients(PLAIN, 2, 40 + step))
            by_rank = random_gradients(PLAIN, 2, step)
            pair.backward(by_rank)
            pair.params[2].grad.zero_()
            pair.oracle.reduced[2] = torch.zeros_like(pair.oracle.params[2])
            if step == 3:
                again = random_gradients(PLAIN, 2, 80)
                pair.backward(again)
            pair.step()
            pair.zero_grad()
            pair.check(step)

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


# Clipping

NORMS = (2.0, 1.0, 3.0, float("inf"), "inf", 2, 0.5, torch.tensor(2.0))


@pytest.mark.parametrize("gradients", ["local", "reduced"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_clip_grad_norm_equals_torchs(world_size: int, gradients: str) -> None:
    def clip(pair: Pair, max_norm: float, norm_type: Any, where: object) -> None:
        total = pair.optimizer.clip_grad_norm_(max_norm, norm_type)
        for p, g in zip(pair.oracle.params, pair.oracle.reduced, strict=True):
            p.grad = g
        some = [p for p in pair.oracle.params if p.numel()]  # torch cannot take the maximum of an empty gradient
        expected = torch.nn.utils.clip_grad_norm_(some, max_norm, norm_type)
        assert isinstance(total, torch.Tensor) and total.shape == ()
        torch.testing.assert_close(
            total.double(), expected.double(), rtol=1e-5, atol=1e-7, msg=lambda m: f"{where}: {m}"
        )
        assert not dist.is_initialized() or same_everywhere(total), where

    def ranks(rank: int) -> None:
        for specs in (PLAIN, [Spec((2,))], [*MIXED, Spec((90,))]):
            for norm_type in NORMS:
                pair = Pair(make_parameters(specs), lr=0.1, t0=1, gradients=gradients, bucket_bytes=512)
                for step, max_norm in enumerate([0.5, 1e6, 0.01]):
                    pair.backward(random_gradients(specs, world_size, step))
                    clip(pair, max_norm, norm_type, (norm_type, max_norm))
                    pair.step()
                    pair.zero_grad()
                pair.optimizer.synchronize()
                for p, twin in zip(pair.params, pair.oracle.params, strict=True):
                    torch.testing.assert_close(p.detach(), twin.detach(), rtol=1e-5, atol=1e-6)

    run_ranks(world_size, ranks)


def test_clip_after_accumulation_twice_and_without_any_gradient() -> None:
    def ranks(rank: int) -> None:
        params = make_parameters(PLAIN)
        optimizer = ShardedASGD(named(params), lr=0.1, find_unused_parameters=True)
        assert optimizer.clip_grad_norm_(1.0).item() == 0
        for _ in range(2):
            with optimizer.no_sync():
                backward(params, [torch.full(s.shape, 3.0) for s in PLAIN])
        number = sum(p.numel() for p in params)
        total = optimizer.clip_grad_norm_(1.0)  # also takes up what no_sync() left
        torch.testing.assert_close(total, torch.tensor(6.0 * number**0.5))
        torch.testing.assert_close(optimizer.clip_grad_norm_(1.0), torch.tensor(1.0))
        before = [p.detach().clone() for p in params]
        optimizer.step()
        moved = torch.cat([(p.detach() - b * (1 - 1e-4 * 0.1)).flatten() for p, b in zip(params, before, strict=True)])
        torch.testing.assert_close(moved, torch.full((number,), -0.1 / number**0.5), rtol=1e-2, atol=1e-6)

    run_ranks(2, ranks)


def test_clip_counts_only_parameters_with_a_gradient() -> None:
    def ranks(rank: int) -> None:
        params = make_parameters(PLAIN)
        params[1].requires_grad_(False)
        optimizer = ShardedASGD(named(params), lr=0.1)
        ones = [torch.ones(s.shape) for s in PLAIN]
        backward(params, ones)
        expected = sum(p.numel() for p in params if p.requires_grad)
        assert optimizer.clip_grad_norm_(1e9, 1.0).item() == expected

    run_ranks(2, ranks)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_clip_of_a_bad_gradient_is_as_bad_as_torchs(bad: float) -> None:
    def ranks(rank: int) -> None:
        for norm_type in (2.0, float("inf")):
            pair = Pair(make_parameters(PLAIN), lr=0.1)
            grads = random_gradients(PLAIN, 2, 0)
            grads[1][3][200] = bad  # type: ignore[index]
            pair.backward(grads)
            total = pair.optimizer.clip_grad_norm_(1.0, norm_type)
            for p, g in zip(pair.oracle.params, pair.oracle.reduced, strict=True):
                p.grad = g
            assert same_bits(total, torch.nn.utils.clip_grad_norm_(pair.oracle.params, 1.0, norm_type))
            pair.step()
            for p, twin in zip(pair.params, pair.oracle.params, strict=True):
                assert torch.equal(p.isnan(), twin.isnan())

    run_ranks(2, ranks)


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

    run_ranks(2, ranks)


# torch.compile


@pytest.mark.parametrize("overlap", [False, True], ids=["module not given", "module given"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_model(overlap: bool) -> None:
    def ranks(rank: int) -> None:
        model, twin = Messenger(), Messenger()
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


# module=: parameters are complete whenever anyone of ours, or the model, reads them


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


def test_alone_there_is_nothing_to_reduce() -> None:
    def alone() -> None:
        params = make_parameters(PLAIN)
        optimizer = ShardedASGD(named(params), lr=0.1)
        with Sent() as sent, optimizer.no_sync():
            backward(params, random_gradients(PLAIN, 1, 0)[0])
            optimizer.step()
        optimizer.synchronize()
        assert sent.elements == 0

    run_alone(alone)


def test_what_a_stand_in_does_not_support_raises() -> None:
    """Writing to it would be lost; zeroing is supported in every form."""

    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0, lambd=0.1)
        pair.backward(random_gradients(PLAIN, 2, 0))
        grads = [p.grad for p in pair.params]
        for write in (lambda g: g.copy_(torch.zeros_like(pair.params[0])), lambda g: g.mul_(2), lambda g: g.fill_(0)):
            assert "clip_grad_norm_" in message_of(lambda write=write: write(grads[0]), RuntimeError)
        torch._foreach_zero_(grads)
        pair.oracle.zero_grad(set_to_none=False)
        pair.step()
        pair.check()

    run_ranks(2, ranks)


def test_another_optimizers_stand_in_is_named() -> None:
    def ranks(rank: int) -> str:
        p = torch.nn.Parameter(torch.ones(64))
        reduced = ShardedASGD([("p", p)], lr=0.1, gradients="reduced")
        local = ShardedASGD([("p", p)], lr=0.1)
        p.sum().backward()
        text = message_of(reduced.step, RuntimeError)
        local.step()
        return text

    a, b = run_ranks(2, ranks)
    assert a == b and "'p'" in a and "another ShardedASGD" in a


@pytest.mark.parametrize("norm_type", [2.0, 3.0, float("inf")])
def test_clipping_has_the_same_bits_for_any_bucket_size(norm_type: float) -> None:
    def train(rank: int, bucket_bytes: int) -> list[torch.Tensor]:
        params = make_parameters(PLAIN)
        optimizer = ShardedASGD(params, lr=0.1, t0=2, bucket_bytes=bucket_bytes)
        for step in range(10):
            backward(params, random_gradients(PLAIN, 3, step)[rank])
            assert optimizer.clip_grad_norm_(1.0, norm_type) > 1
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in params]

    def ranks(rank: int) -> None:
        small, large = train(rank, 64), train(rank, 2**22)
        assert all(map(same_bits, small, large))

    run_ranks(3, ranks)


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
