"""The average as a product: swapped in for evaluation and out again, and started by hand."""

import contextlib
import copy
import time

import pytest
import torch
import torch.distributed as dist

from dist_asgd import ShardedASGD
from dist_asgd.sharding.shard import Shard
from tests.support.averaging import trained
from tests.support.oracle import (
    MIXED,
    PLAIN,
    Messenger,
    Pair,
    Spec,
    backward,
    make_parameters,
    named,
    random_gradients,
    same_bits,
    tokens_of,
)
from tests.support.ranks import message_of, run_alone, run_ranks

LOW = [Spec((33,), torch.bfloat16), Spec((5, 7), torch.float16), Spec((9, 3))]


@pytest.mark.parametrize("gradients", ["local", "reduced"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_inside_the_parameters_hold_the_average_and_outside_they_are_as_before(world_size: int, gradients: str) -> None:
    def ranks(rank: int) -> None:
        for specs in (list(MIXED), LOW):
            pair = trained(specs, world_size, gradients=gradients)
            before = [p.detach().clone() for p in pair.params]
            with pair.optimizer.averaged_parameters():
                for p, twin in zip(pair.params, pair.oracle.params, strict=True):
                    assert same_bits(p, pair.oracle.optimizer.state[twin]["ax"].to(p.dtype))
            assert all(map(same_bits, pair.params, before))
            pair.train(range(50, 55))

    run_ranks(world_size, ranks)


def test_without_ranks() -> None:
    def alone() -> None:
        pair = trained(LOW, 1)
        before = [p.detach().clone() for p in pair.params]
        with pair.optimizer.averaged_parameters():
            assert not same_bits(pair.params[2], before[2])
        assert all(map(same_bits, pair.params, before))
        pair.train(range(50, 55))

    run_alone(alone)


def test_an_exception_inside_still_restores() -> None:
    def ranks(rank: int) -> None:
        pair = trained(LOW, 2)
        before = [p.detach().clone() for p in pair.params]
        with pytest.raises(KeyError), pair.optimizer.averaged_parameters():
            raise KeyError("from evaluation")
        assert all(map(same_bits, pair.params, before))
        pair.train(range(50, 55))

    run_ranks(2, ranks)


def test_what_evaluation_writes_to_the_parameters_is_dropped() -> None:
    def ranks(rank: int) -> None:
        pair = trained(LOW, 2)
        with pair.optimizer.averaged_parameters(), torch.no_grad():
            for p in pair.params:
                p.zero_()
        pair.train(range(50, 55))

    run_ranks(2, ranks)


@pytest.mark.parametrize("world_size", [1, 2])
def test_looking_at_the_state_inside_leaves_the_masters_alone(world_size: int) -> None:
    """The state of a parameter can be read; what would be saved beside the averages is refused (test_swap.py)."""

    def ranks(rank: int) -> None:
        pair = trained(LOW, world_size, t0=0)
        before = copy.deepcopy(pair.optimizer.state_dict()["state"])
        with pair.optimizer.averaged_parameters():
            inside = [pair.optimizer.state[p] for p in pair.params]
            for index, entry in before.items():
                assert all(torch.equal(inside[index][key], value) for key, value in entry.items()), index
        after = pair.optimizer.state_dict()["state"]
        assert all(torch.equal(after[index]["master"], before[index]["master"]) for index in (0, 1))
        pair.train(range(50, 55))

    run_ranks(world_size, ranks)


def test_an_exception_on_one_rank_gets_out_while_the_others_are_still_inside() -> None:
    def ranks(rank: int) -> None:
        pair = trained(LOW, 2, t0=0)
        before = [p.detach().clone() for p in pair.params]
        metric = torch.tensor([1.0 + rank])
        if rank == 1:
            start = time.monotonic()
            with pytest.raises(KeyError), pair.optimizer.averaged_parameters():
                raise KeyError("from evaluation")
            assert time.monotonic() - start < 10
            dist.all_reduce(metric)  # what the other rank waits for in its block
        else:
            with pair.optimizer.averaged_parameters():
                dist.all_reduce(metric)
        assert metric.item() == 3, "a collective of ours met one of the user's"
        pair.optimizer.synchronize()
        assert all(map(same_bits, pair.params, before))
        pair.train(range(50, 55))

    run_ranks(2, ranks, timeout=30)


def test_a_step_inside_is_refused_and_harmless() -> None:
    def ranks(rank: int) -> None:
        pair = trained(list(PLAIN), 2)
        with pair.optimizer.averaged_parameters():
            text = message_of(pair.optimizer.step, RuntimeError)
            assert "averaged_parameters" in text
            text = message_of(lambda: pair.optimizer.averaged_parameters().__enter__(), RuntimeError)
            assert "averaged_parameters" in text
        pair.train(range(50, 55))

    run_ranks(2, ranks)


def test_a_swap_between_backward_and_step_keeps_the_gradients() -> None:
    def ranks(rank: int) -> None:
        pair = trained(list(PLAIN), 2)
        pair.backward(random_gradients(PLAIN, 2, 60))
        with pair.optimizer.averaged_parameters():
            pass
        pair.step()
        pair.zero_grad()
        pair.check()

    run_ranks(2, ranks)


def test_before_averaging_the_average_is_the_parameter() -> None:
    def ranks(rank: int) -> None:
        for steps in (0, 3):
            pair = trained(list(MIXED), 2, steps, t0=1e6)
            before = [p.detach().clone() for p in pair.params]
            with pair.optimizer.averaged_parameters():
                assert all(map(same_bits, pair.params, before))
            assert all(map(same_bits, pair.params, before))
            pair.check()

    run_ranks(2, ranks)


def test_parameters_that_never_had_a_gradient_stay_in_the_swap() -> None:
    """torch's ax of such a parameter does not exist; a zero must not get into the model."""

    def ranks(rank: int) -> None:
        params = make_parameters(PLAIN)
        params[1].requires_grad_(False)
        optimizer = ShardedASGD(named(params), lr=0.1, t0=0)
        for step in range(5):
            backward(params, random_gradients(PLAIN, 2, step)[rank])
            optimizer.step()
            optimizer.zero_grad()
        frozen = params[1].detach().clone()
        with optimizer.averaged_parameters():
            assert same_bits(params[1], frozen)
        assert same_bits(params[1], frozen)

    run_ranks(2, ranks)


def test_weights_loaded_before_a_swap_are_honoured() -> None:
    """Before t0 the average is the parameter, also when the parameter was written from outside."""

    def ranks(rank: int) -> None:
        for spec in (Spec((40,)), Spec((40,), torch.bfloat16)):
            (p,) = make_parameters([spec])
            optimizer = ShardedASGD([("w", p)], lr=0.1)
            backward([p], random_gradients([spec], 2, 0)[rank])
            optimizer.step()
            with torch.no_grad():
                p.fill_(3.25)
            with optimizer.averaged_parameters():
                assert torch.equal(p, torch.full_like(p, 3.25))
            assert torch.equal(p, torch.full_like(p, 3.25))
            full = optimizer.full_state_dict()
            if rank == 0:
                assert torch.equal(full["state"][0]["ax"], torch.full((40,), 3.25))

    run_ranks(2, ranks)


def test_buffers_and_module_overlap() -> None:
    def ranks(rank: int) -> None:
        model = Messenger()
        optimizer = ShardedASGD(model.named_parameters(), lr=0.3, t0=0, module=model, bucket_bytes=200)
        tokens = tokens_of(0, 0)
        for step in range(6):
            optimizer.zero_grad()
            (model(tokens_of(rank, step)) ** 2).mean().backward()
            optimizer.step()
        raw = model(tokens).detach()
        with optimizer.averaged_parameters(), torch.no_grad():
            averaged = model(tokens)
        assert not torch.equal(raw, averaged)
        assert torch.equal(raw, model(tokens))
        full = optimizer.full_state_dict()
        if rank == 0:
            twin = Messenger()
            with torch.no_grad():
                for index, p in enumerate(twin.parameters()):
                    p.copy_(full["state"][index]["ax"])
            assert torch.equal(twin(tokens), averaged)

    run_ranks(2, ranks)


@pytest.mark.parametrize("world_size", [1, 2])
def test_start_averaging_opens_the_window_now_for_every_group(world_size: int) -> None:
    def ranks(rank: int) -> None:
        groups = [{"params": make_parameters(PLAIN[:2])}, {"params": make_parameters(PLAIN[2:]), "t0": 500, "lr": 0.01}]
        pair = Pair(groups, lr=0.05, lambd=0.01)
        for step in range(1, 31):
            pair.backward(random_gradients(PLAIN, world_size, step))
            pair.step()
            pair.zero_grad()
            pair.check(step)
            if step in (7, 20):  # the second time it starts anew
                pair.optimizer.start_averaging()
                for index in range(2):
                    pair.oracle.optimizer.param_groups[index]["t0"] = step
                    assert pair.optimizer.param_groups[index]["t0"] == step

    run_ranks(world_size, ranks)


def test_start_averaging_before_the_first_step() -> None:
    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.05)
        pair.optimizer.start_averaging()
        pair.set_group(0, t0=0)
        pair.train(range(8))

    run_ranks(2, ranks)


def test_t0_may_be_set_by_hand_as_with_torch() -> None:
    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.05)
        for step in range(30):
            if step in (4, 12, 20):
                pair.set_group(0, t0={4: 4, 12: 1e6, 20: 0}[step])
            pair.backward(random_gradients(PLAIN, 2, step))
            pair.step()
            pair.zero_grad()
            pair.check(step)

    run_ranks(2, ranks)


@pytest.mark.parametrize("what", ["averaged_parameters", "full_state_dict", "clip_grad_norm_"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_parameters_converted_after_training_are_noticed_at_the_next_call(world_size: int, what: str) -> None:
    """On one rank only: still every rank hears of it, and none takes raw weights for their average."""

    def ranks(rank: int) -> str:
        pair = trained(list(PLAIN), world_size)
        model = torch.nn.ParameterList(pair.params)
        if rank == world_size - 1:
            model.double()
        calls = {
            "averaged_parameters": lambda: pair.optimizer.averaged_parameters().__enter__(),
            "full_state_dict": pair.optimizer.full_state_dict,
            "clip_grad_norm_": lambda: pair.optimizer.clip_grad_norm_(1.0),
        }
        if what == "clip_grad_norm_":
            for p in pair.params:
                p.grad = torch.ones_like(p)
        return message_of(calls[what], RuntimeError)

    texts = run_ranks(world_size, ranks)
    assert all(text == texts[0] for text in texts)
    assert "float64" in texts[0] and "layer" in texts[0]


def test_weights_assigned_to_the_module_are_noticed_before_the_average_is_used() -> None:
    def ranks(rank: int) -> None:
        torch.manual_seed(0)
        model = Messenger()
        optimizer = ShardedASGD(model.named_parameters(), lr=0.1, t0=0, module=model)
        for step in range(4):
            (model(tokens_of(rank, step)) ** 2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
        text = message_of(lambda: optimizer.averaged_parameters().__enter__(), RuntimeError)
        assert "assign=True" in text

    run_ranks(2, ranks)


def test_a_backward_inside_on_one_rank_only_is_no_harm() -> None:
    """Its gradients wait for the next backward or step, as those of no_sync()."""

    def ranks(rank: int) -> None:
        pair = trained(list(PLAIN), 2)
        before = [p.detach().clone() for p in pair.params]
        with pair.optimizer.averaged_parameters():
            if rank == 0:
                backward(pair.params, random_gradients(PLAIN, 2, 60)[0])
        assert all(map(same_bits, pair.params, before))
        pair.zero_grad()
        pair.train(range(50, 55))

    run_ranks(2, ranks, timeout=20)


@pytest.mark.parametrize("where", ["swap_in", "swap_out"])
@pytest.mark.parametrize("at", [1, 2, 5])
def test_an_interrupt_while_swapping_still_restores(where: str, at: int) -> None:
    """KeyboardInterrupt, at bucket number `at`: before it is swapped, or between that and what follows."""

    def alone(after: bool) -> None:
        pair = trained(list(PLAIN), 1)
        before = [p.detach().clone() for p in pair.params]
        original, calls = getattr(Shard, where), []

        def interrupted(shard: Shard, *suffix: str) -> None:
            calls.append(shard)
            if len(calls) == at and not after:
                raise KeyboardInterrupt
            original(shard, *suffix)
            if len(calls) == at and after:
                raise KeyboardInterrupt

        setattr(Shard, where, interrupted)
        with pytest.raises(KeyboardInterrupt), pair.optimizer.averaged_parameters():
            pass
        setattr(Shard, where, original)
        assert all(map(same_bits, pair.params, before))
        pair.train(range(50, 55))

    for after in (False, True):
        run_alone(alone, after)


@pytest.mark.parametrize("who", ["every rank", "one rank"])
def test_a_swap_that_fails_at_a_later_bucket_restores(who: str) -> None:
    """As out of memory does: the all-gathers of the buckets before it are still under way then."""

    def ranks(rank: int) -> None:
        specs = [Spec((100_000,)) for _ in range(4)]
        pair = trained(specs, 2, steps=4, t0=0, bucket_bytes=400_000)
        before = [p.detach().clone() for p in pair.params]
        original, calls = Shard.swap_in, []

        def failing(shard: Shard, suffix: str) -> None:
            calls.append(shard)
            if len(calls) == 4 and (who == "every rank" or rank == 0):
                raise torch.OutOfMemoryError("the copy of the shard")
            original(shard, suffix)

        Shard.swap_in = failing  # type: ignore[method-assign]
        entered = False
        with contextlib.suppress(torch.OutOfMemoryError), pair.optimizer.averaged_parameters():
            entered = True
        Shard.swap_in = original  # type: ignore[method-assign]
        assert len(calls) == 4 and entered == (who == "one rank" and rank == 1)
        pair.optimizer.synchronize()
        assert all(map(same_bits, pair.params, before))
        pair.train(range(50, 55))

    run_ranks(2, ranks, timeout=20)


def test_the_average_of_a_frozen_parameter_outlasts_a_later_t0() -> None:
    """The others' averages start anew, and the bucket needs none of theirs; the frozen one's stays what it was."""

    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
        pair.train(range(4))
        pair.set_group(0, t0=1e6)
        pair.train(range(4, 5))  # the last that changes the average: it sets mu to 1
        pair.set_requires_grad(1, False)
        for step in range(5, 8):
            pair.train(range(step, step + 1))

    run_ranks(2, ranks)
