"""Tied and doubled parameters, several optimizers over one model, process groups of some ranks, copies."""

import copy
import gc
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.optim import lr_scheduler

from dist_asgd import ShardedASGD
from tests.support.oracle import (
    PLAIN,
    Pair,
    Spec,
    backward,
    check_dense_state,
    make_parameters,
    named,
    random_gradients,
    reduce_in_rank_order,
    same_bits,
)
from tests.support.ranks import run_alone, run_ranks


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Embedding(8, 6)
        self.second = torch.nn.Linear(6, 8, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.first(x) * self.second.weight[: x.shape[0]]).sum()


def test_tied_parameters_are_updated_once() -> None:
    def ranks(rank: int) -> None:
        torch.manual_seed(0)
        model = Tied()
        twin = copy.deepcopy(model)
        optimizer = ShardedASGD(model.named_parameters(), lr=0.1, t0=0)
        reference = torch.optim.ASGD(twin.parameters(), lr=0.1, t0=0, foreach=False)
        data = [torch.arange(4), torch.arange(3, 7)]
        for step in range(6):
            optimizer.zero_grad()
            model(data[rank]).backward()
            optimizer.step()
            each = [torch.autograd.grad(twin(x), list(twin.parameters())) for x in data]
            for p, *grads in zip(twin.parameters(), *each, strict=True):
                p.grad = reduce_in_rank_order(grads)
            reference.step()
            assert model.first.weight is model.second.weight
            assert same_bits(model.first.weight, twin.first.weight), step

    run_ranks(2, ranks)


def test_duplicates_are_treated_as_torch_treats_them() -> None:
    def outcome(build: Callable[[Any], torch.optim.Optimizer], params: Any) -> tuple[str, str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                build(params)
                error = ""
            except ValueError as raised:
                error = str(raised)
        return error, " ".join(str(w.message) for w in caught)

    def alone() -> None:
        a, b = make_parameters(PLAIN[:2])
        for make in (lambda: [a, b, a], lambda: [{"params": [a]}, {"params": [b, a]}], lambda: [("x", a), ("x", b)]):
            assert outcome(ShardedASGD, make()) == outcome(torch.optim.ASGD, make())

    run_alone(alone)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_parameter_listed_twice_is_updated_once(world_size: int) -> None:
    """torch warns and then steps it twice; that serves nobody."""

    def ranks(rank: int) -> None:
        p, q = make_parameters(PLAIN[:2])
        twins = make_parameters(PLAIN[:2])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = ShardedASGD([p, q, p], lr=0.1, t0=0)
        theirs = torch.optim.ASGD(twins, lr=0.1, t0=0, foreach=False)
        for step in range(5):
            by_rank = random_gradients(PLAIN[:2], world_size, step)
            ours.zero_grad()
            backward([p, q], by_rank[rank])
            ours.step()
            for twin, *grads in zip(twins, *by_rank, strict=True):
                twin.grad = reduce_in_rank_order(grads)
            theirs.step()
            ours.load_state_dict(ours.state_dict())
            assert same_bits(p, twins[0]) and same_bits(q, twins[1]), step

    run_ranks(world_size, ranks)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_second_optimizer_over_the_same_parameters_takes_over(world_size: int) -> None:
    """AWD-LSTM's finetuning is a second ASGD over a trained model."""

    def ranks(rank: int) -> None:
        params = make_parameters(PLAIN)
        first = Pair(params, lr=0.1, t0=0)
        for step in range(4):
            first.backward(random_gradients(PLAIN, world_size, step))
            first.step()
            first.zero_grad()
        del first
        gc.collect()
        second = Pair(params, lr=0.05, t0=2)
        for step in range(8):
            second.backward(random_gradients(PLAIN, world_size, 10 + step))
            second.step()
            second.zero_grad()
        second.check()

    run_ranks(world_size, ranks)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_second_optimizer_takes_over_while_the_first_is_still_alive(world_size: int) -> None:
    """Its scheduler, for one, refers to it."""

    def ranks(rank: int) -> None:
        params = make_parameters(PLAIN)
        first = Pair(params, lr=0.1, t0=0)
        scheduler = lr_scheduler.StepLR(first.optimizer, 1)
        for step in range(3):
            first.backward(random_gradients(PLAIN, world_size, step))
            first.step()
            first.zero_grad()
        second = Pair(params, lr=0.05, t0=2)
        for step in range(6):
            second.backward(random_gradients(PLAIN, world_size, 10 + step))
            second.step()
            second.zero_grad()
            second.check(step)
        assert scheduler.optimizer is first.optimizer

    run_ranks(world_size, ranks)


def test_two_optimizers_whose_gradients_come_in_another_order_on_each_rank() -> None:
    def ranks(rank: int) -> None:
        specs = [Spec((50,))]
        pairs = [Pair(make_parameters(specs, seed), lr=0.1, t0=0) for seed in range(2)]
        for step in range(5):
            each = [random_gradients(specs, 2, 10 * step + which) for which in range(2)]
            for pair, by_rank in zip(pairs, each, strict=True):
                pair.oracle.backward(by_rank)
            order = (0, 1) if rank == 0 else (1, 0)  # the later a term is made, the sooner backward comes to it
            backward([pairs[i].params[0] for i in order], [each[i][rank][0] for i in order])
            for pair in pairs:
                pair.step()
                pair.zero_grad()
                pair.check(step)

    run_ranks(2, ranks)


def test_two_optimizers_one_of_which_is_unused_on_a_rank() -> None:
    def ranks(rank: int) -> None:
        specs = [Spec((50,)), Spec((3, 7))]
        pairs = [Pair(make_parameters(specs, seed), lr=0.1, find_unused_parameters=True) for seed in range(2)]
        for step in range(4):
            used = [random_gradients(specs, 2, step), [random_gradients(specs, 1, step)[0], [None, None]]]
            for pair, by_rank in zip(pairs, used, strict=True):
                pair.oracle.backward(by_rank)
            backward([p for pair in pairs for p in pair.params], [*used[0][rank], *used[1][rank]])
            for pair in pairs:
                pair.step()
                pair.zero_grad()
                pair.check(step)

    run_ranks(2, ranks, timeout=20)


def test_many_optimizers_one_after_another() -> None:
    """Whatever each of them opens between the ranks must not meet what an earlier one left there."""

    def ranks(rank: int) -> None:
        if rank == 1:
            gc.disable()  # so that the ranks let go of their optimizers at different times
        for number in range(25):
            params, twins = make_parameters(PLAIN[:2], number), make_parameters(PLAIN[:2], number)
            optimizer = ShardedASGD(named(params), lr=0.1)
            reference = torch.optim.ASGD(twins, lr=0.1, foreach=False)
            loop = [optimizer]
            loop.append(loop)  # only the garbage collector frees it
            for optimized, stepping in ((params, optimizer), (twins, reference)):
                backward(optimized, [torch.ones_like(p) for p in optimized])
                stepping.step()
            assert all(map(torch.equal, params, twins)), number
            if rank == 0:
                del optimizer, loop, stepping
                gc.collect()

    run_ranks(2, ranks)


def test_ranks_may_be_members_of_different_numbers_of_groups() -> None:
    def ranks(rank: int) -> None:
        dist.new_group([0, 1])
        dist.new_group([0], use_local_synchronization=True) if rank == 0 else None
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
        for step in range(3):
            pair.backward(random_gradients(PLAIN, 3, step))
            pair.step()
            pair.zero_grad()
        pair.check()

    run_ranks(3, ranks, timeout=20)


def test_two_optimizers_over_two_halves_of_a_model() -> None:
    def ranks(rank: int) -> None:
        params, twins = make_parameters(PLAIN), make_parameters(PLAIN)
        optimizers = [ShardedASGD(named(params[:2]), lr=0.1, t0=0), ShardedASGD(named(params[2:]), lr=0.2, t0=1)]
        references = [
            torch.optim.ASGD(twins[:2], lr=0.1, t0=0, foreach=False),
            torch.optim.ASGD(twins[2:], lr=0.2, t0=1, foreach=False),
        ]
        for step in range(8):
            by_rank = random_gradients(PLAIN, 2, step)
            backward(params, by_rank[rank])
            for twin, *grads in zip(twins, *by_rank, strict=True):
                twin.grad = reduce_in_rank_order(grads)
            for optimizer in (*optimizers, *references):
                optimizer.step()
                optimizer.zero_grad()
            assert all(map(same_bits, params, twins)), step

    run_ranks(2, ranks)


def test_the_optimizer_does_not_outlive_its_last_reference() -> None:
    def ranks(rank: int) -> None:
        import weakref

        params = make_parameters(PLAIN)
        optimizer = ShardedASGD(named(params), lr=0.1)
        backward(params, random_gradients(PLAIN, 2, 0)[rank])
        optimizer.step()
        optimizer.zero_grad()
        watch = weakref.ref(optimizer)
        del optimizer
        gc.collect()
        assert watch() is None, "hooks keep the optimizer alive"
        grads = random_gradients(PLAIN, 2, 1)[rank]
        backward(params, grads)  # the parameters are ordinary again
        assert all(type(p.grad) is torch.Tensor and same_bits(p.grad, g) for p, g in zip(params, grads, strict=True))

    run_ranks(2, ranks)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_copy_of_the_optimizer_is_refused_or_right(world_size: int, how: str) -> None:
    def ranks(rank: int) -> None:
        params = make_parameters(PLAIN)
        pair = Pair(params, lr=0.1, t0=0)

        def train(steps: range) -> None:
            for step in steps:
                pair.backward(random_gradients(PLAIN, world_size, step))
                pair.step()
                pair.zero_grad()

        train(range(4))
        holder = {"model": torch.nn.ParameterList(params), "optimizer": pair.optimizer}
        try:
            copied = copy.deepcopy(holder) if how == "deepcopy" else pickle.loads(pickle.dumps(holder))
        except (TypeError, RuntimeError, NotImplementedError, pickle.PicklingError) as error:
            assert "ShardedASGD" in str(error) or "state_dict" in str(error), f"not a clear refusal: {error}"
        else:
            twin = Pair.__new__(Pair)
            twin.__dict__.update(pair.__dict__)
            twin.params, twin.optimizer = list(copied["model"]), copied["optimizer"]
            twin.oracle = copy.deepcopy(pair.oracle)
            for step in range(4, 8):
                twin.backward(random_gradients(PLAIN, world_size, step))
                twin.step()
                twin.zero_grad()
            twin.check("in the copy")
        train(range(20, 24))
        pair.check("in the original")

    run_ranks(world_size, ranks)


def test_a_deepcopy_of_the_model_is_independent() -> None:
    def ranks(rank: int) -> None:
        model = torch.nn.ParameterList(make_parameters(PLAIN))
        pair = Pair(list(model), lr=0.1, t0=0)
        twin = copy.deepcopy(model)
        pair.backward(random_gradients(PLAIN, 2, 0))
        backward(list(twin), random_gradients(PLAIN, 2, 7)[0])
        assert all(type(p.grad) is torch.Tensor for p in twin), "the copy's gradients were taken"
        with torch.no_grad():
            for p in twin:
                p.zero_()
        pair.step()
        pair.check()

    run_ranks(2, ranks)


def test_a_process_group_of_some_of_the_ranks() -> None:
    def ranks(rank: int) -> None:
        groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        params, twins = make_parameters(PLAIN, rank % 2), make_parameters(PLAIN, rank % 2)
        optimizer = ShardedASGD(named(params), lr=0.1, t0=0, process_group=groups[rank % 2])
        reference = torch.optim.ASGD(twins, lr=0.1, t0=0, foreach=False)
        for step in range(6):
            by_rank = random_gradients(PLAIN, 2, 10 * step + rank % 2)
            optimizer.zero_grad()
            backward(params, by_rank[rank // 2])
            optimizer.step()
            for twin, *grads in zip(twins, *by_rank, strict=True):
                twin.grad = reduce_in_rank_order(grads)
            reference.step()
            assert all(map(same_bits, params, twins)), step
        full = optimizer.full_state_dict()
        assert bool(full) == (rank < 2), "rank 0 of the group gets the dense state"
        if full:
            check_dense_state(full, reference)

    run_ranks(4, ranks)
