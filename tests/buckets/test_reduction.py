"""gradients="local": what backward leaves behind, and gradients that are missing or come in any order."""

import gc
import random
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from dist_asgd import ShardedASGD
from dist_asgd.buckets import reducer
from dist_asgd.buckets.flat import FlatBucket
from dist_asgd.comm.collectives import Collectives, DeviceTransfer
from tests.support.oracle import (
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
from tests.support.ranks import Sent, message_of, run_alone, run_ranks

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
            lambda: grad.view(-1)[0],
            lambda: grad.numpy(),
            lambda: torch.zeros(257).copy_(grad),
            lambda: dist.all_reduce(grad),
        ):
            text = message_of(wrong, RuntimeError, TypeError, NotImplementedError)
            assert "gradient" in text.lower() and ("piece" in text or "shard" in text or "ShardedASGD" in text), text
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


def test_alone_there_is_nothing_to_reduce() -> None:
    def alone() -> None:
        params = make_parameters(PLAIN)
        optimizer = ShardedASGD(named(params), lr=0.1)
        with Sent() as sent, optimizer.no_sync():
            backward(params, random_gradients(PLAIN, 1, 0)[0])
            optimizer.step()
        optimizer.synchronize()
        assert not sent.sizes

    run_alone(alone)


def test_zeroing_after_other_writes_is_zero() -> None:
    """What needs the whole gradient raises and writes nothing."""

    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0, lambd=0.1)
        pair.backward(random_gradients(PLAIN, 2, 0))
        grads = [p.grad for p in pair.params]
        for write in (lambda g: g.cumsum_(0), lambda g: g.__setitem__(0, 1.0), lambda g: g.resize_(3)):
            assert "clip_grad_norm_" in message_of(lambda write=write: write(grads[0]), RuntimeError)
        grads[0].copy_(torch.ones_like(pair.params[0])).mul_(2)
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
            pair.drop_gradients(by)
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


def test_hooks_in_two_threads_start_reductions_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward has a thread for each device; here two threads run a backward each, on one device."""

    def ranks(rank):
        params = [torch.nn.Parameter(torch.full((4,), float(number))) for number in range(3)]
        optimizer = ShardedASGD(
            [(f"p{number}", p) for number, p in enumerate(params)], lr=0.1, lambd=0, bucket_bytes=16
        )
        arrived, starting, order = threading.Event(), threading.Event(), []
        buckets = optimizer._reducer.buckets
        assert len(buckets) == 3
        first, second, third = (bucket.params[0] for bucket in buckets)
        first.register_post_accumulate_grad_hook(lambda _: arrived.set())
        start = FlatBucket.start_reduce

        def start_slowly(bucket, *args):
            if bucket is buckets[0]:
                starting.set()
                time.sleep(0.3)
            order.append(buckets.index(bucket))
            start(bucket, *args)

        monkeypatch.setattr(FlatBucket, "start_reduce", start_slowly)

        def backward(*losses, wait):
            losses[0].register_hook(lambda _: wait.wait(10) and None)
            sum(loss.sum() for loss in losses).backward()

        one = threading.Thread(target=backward, args=(third * 1, first * 1), kwargs={"wait": starting})
        other = threading.Thread(target=backward, args=(second * 1,), kwargs={"wait": arrived})
        for thread in (one, other):
            thread.start()
        for thread in (one, other):
            thread.join()
        optimizer.step()
        return order, [param.detach().tolist() for param in params]

    for order, values in run_ranks(2, ranks):
        assert order[:3] == [0, 1, 2]
        assert values == [[pytest.approx(number - 0.1)] * 4 for number in range(3)]


@pytest.mark.parametrize(("bound", "most"), [(2**20, 5), (1, 2)], ids=["room", "full"])
def test_a_device_is_never_polled_in_backward(monkeypatch: pytest.MonkeyPatch, bound: int, most: int) -> None:
    """Collectives without gloo's second group stand for NCCL's: a stream waits for them. This device is far behind."""

    def ranks(rank: int) -> None:
        on, finish, start = Collectives.on, FlatBucket.finish_oldest_reduce, FlatBucket.start_reduce
        under_way, peak = 0, 0

        def count(change: int) -> None:
            nonlocal under_way, peak
            under_way += change
            peak = max(peak, under_way)

        monkeypatch.setattr(Collectives, "on", lambda *args: replace(on(*args), downward=None))
        monkeypatch.setattr(DeviceTransfer, "completes_within", lambda _, seconds: polls.append(seconds))
        monkeypatch.setattr(reducer, "DEVICE_BYTES", bound)
        monkeypatch.setattr(FlatBucket, "start_reduce", lambda *args: count(1) or start(*args))
        monkeypatch.setattr(FlatBucket, "finish_oldest_reduce", lambda bucket: count(-1) or finish(bucket))
        params = [torch.nn.Parameter(torch.zeros(64)) for _ in range(5)]
        optimizer, polls = ShardedASGD(params, lr=0.1, lambd=0, bucket_bytes=64), []
        sum(number * p.sum() for number, p in enumerate(params, rank)).backward()
        assert not any(polls) and peak == most
        optimizer.step()
        for number, p in enumerate(params):
            assert torch.equal(p, torch.zeros(64).sub_(torch.tensor(number + 0.5) * 0.1))

    run_ranks(2, ranks)
