"""The habits of torch.optim: groups, closures, schedulers, hooks, zero_grad, ties, copies; and what a step costs."""

import copy
import gc
import pickle
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode

from dist_asgd import ShardedASGD
from oracle import (
    MIXED,
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
from ranks import message_of, run_alone, run_ranks

# Arguments


def test_defaults_are_torchs() -> None:
    def alone() -> None:
        ours = ShardedASGD(make_parameters(PLAIN))
        theirs = torch.optim.ASGD(make_parameters(PLAIN))
        for key in ("lr", "lambd", "alpha", "t0", "weight_decay", "maximize"):
            assert ours.defaults[key] == theirs.defaults[key]
            assert ours.param_groups[0][key] == theirs.param_groups[0][key]
        assert isinstance(ours, torch.optim.Optimizer)

    run_alone(alone)


def test_positional_arguments_come_in_torchs_order() -> None:
    def alone() -> None:
        group = ShardedASGD(make_parameters(PLAIN), 0.5, 0.4, 0.3, 2, 0.1).param_groups[0]
        assert [group[k] for k in ("lr", "lambd", "alpha", "t0", "weight_decay")] == [0.5, 0.4, 0.3, 2, 0.1]

    run_alone(alone)


@pytest.mark.parametrize(
    "form",
    ["tensors", "generator", "pairs", "groups", "groups of pairs", "one tensor as a group", "named_parameters"],
)
def test_every_form_of_params_torch_takes(form: str) -> None:
    def given(params: list[torch.nn.Parameter]) -> Any:
        holder = torch.nn.ParameterList(params)
        return {
            "tensors": params,
            "generator": (p for p in params),
            "pairs": named(params),
            "groups": [{"params": params[:2]}, {"params": params[2:], "lr": 0.3}],
            "groups of pairs": [{"params": named(params[:2])}, {"params": named(params[2:], "other"), "lr": 0.3}],
            "one tensor as a group": [{"params": params[0]}, {"params": params[1:], "t0": 0}],
            "named_parameters": holder.named_parameters(),
        }[form]

    def alone() -> None:
        mine, twins = make_parameters(PLAIN), make_parameters(PLAIN)
        ours = ShardedASGD(given(mine), lr=0.1, t0=2)
        theirs = torch.optim.ASGD(given(twins), lr=0.1, t0=2, foreach=False)
        assert [g.get("param_names") for g in ours.param_groups] == [g.get("param_names") for g in theirs.param_groups]
        for step in range(8):
            for params, optimizer in ((mine, ours), (twins, theirs)):
                optimizer.zero_grad()
                backward(params, random_gradients(PLAIN, 1, step)[0])
                optimizer.step()
        assert all(map(same_bits, mine, twins))
        check_dense_state(ours.full_state_dict(), theirs)

    run_alone(alone)


def test_the_parameter_objects_stay_the_models() -> None:
    def alone() -> None:
        params = make_parameters(MIXED)
        values = [p.detach().clone() for p in params]
        optimizer = ShardedASGD(named(params))
        assert all(a is b for a, b in zip(params, optimizer.param_groups[0]["params"], strict=True))
        assert all(map(same_bits, params, values)), "building the optimizer changed a value"
        assert all(p.is_leaf and p.requires_grad and type(p) is torch.nn.Parameter for p in params)

    run_alone(alone)


def test_memory_layouts_are_kept() -> None:
    def ranks(rank: int) -> None:
        specs = [Spec((5, 3, 2, 4), layout="channels_last"), Spec((6, 9), layout="transposed"), Spec((4, 4))]
        params = make_parameters(specs)
        strides = [p.stride() for p in params]
        pair = Pair(params, lr=0.1, t0=0)
        for step in range(5):
            pair.backward(random_gradients(specs, 2, step))
            pair.step()
            pair.zero_grad()
            assert [p.stride() for p in params] == strides
        pair.check()

    run_ranks(2, ranks)


# Groups


@pytest.mark.parametrize("gradients", ["local", "reduced"])
def test_a_group_added_while_training(gradients: str) -> None:
    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=2, lambd=0.01, gradients=gradients)
        specs = list(PLAIN)
        for step in range(30):
            if step in (3, 11):
                late = [Spec((17,)), Spec((2, 2), torch.float64)]
                pair.add_param_group({"params": make_parameters(late, step), "lr": 0.02 * step, "t0": 1})
                specs += late
            pair.backward(random_gradients(specs, 2, step))
            pair.step()
            pair.zero_grad()
            pair.check_parameters(step)
        pair.check()

    run_ranks(2, ranks)


def test_a_group_of_frozen_parameters_may_be_thawed() -> None:
    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=1)
        for index in range(2):
            pair.set_requires_grad(index, False)
        for step in range(20):
            if step == 7:
                pair.set_requires_grad(0, True)
            if step == 12:
                pair.set_requires_grad(0, False)
                pair.set_requires_grad(1, True)
            pair.backward(random_gradients(PLAIN, 2, step))
            pair.step()
            pair.zero_grad()
            pair.check(step)

    run_ranks(2, ranks)


def test_parameters_frozen_from_the_start_cost_and_change_nothing() -> None:
    def ranks(rank: int) -> None:
        params = make_parameters(PLAIN)
        for p in params[1:]:
            p.requires_grad_(False)
        pair = Pair(params, lr=0.1, t0=0)
        for step in range(6):
            pair.backward(random_gradients(PLAIN, 2, step))
            pair.step()
            pair.zero_grad()
        pair.check()

    run_ranks(2, ranks)


@pytest.mark.parametrize("world_size", [1, 2])
def test_groups_without_parameters_or_elements_do_no_harm(world_size: int) -> None:
    def ranks(rank: int) -> None:
        specs = [*PLAIN, Spec((0,))]
        params, twins = make_parameters(specs), make_parameters(specs)
        ours, theirs = ([{"params": []}, {"params": own[:5]}, {"params": own[5:]}] for own in (params, twins))
        optimizer = ShardedASGD(ours, lr=0.1)
        reference = torch.optim.ASGD(theirs, lr=0.1, foreach=False)
        for step in range(4):
            if step == 2:
                optimizer.start_averaging()
                for group in reference.param_groups:
                    group["t0"] = 2
            by_rank = random_gradients(specs, world_size, step)
            backward(params, by_rank[rank])
            assert optimizer.clip_grad_norm_(1e9) > 0
            for twin, *grads in zip(twins, *by_rank, strict=True):
                twin.grad = reduce_in_rank_order(grads)
            for either in (optimizer, reference):
                either.step()
                either.zero_grad()
            assert all(map(same_bits, params, twins)), step
        full = optimizer.full_state_dict()
        assert rank != 0 or check_dense_state(full, reference) is None

    run_ranks(world_size, ranks)


def test_clipping_where_there_is_nothing_to_clip() -> None:
    def ranks(rank: int) -> None:
        for params in ([torch.nn.Parameter(torch.zeros(0))], [{"params": []}]):
            optimizer = ShardedASGD(params, lr=0.1, find_unused_parameters=True)
            assert optimizer.clip_grad_norm_(1.0).item() == 0

    run_ranks(2, ranks)


# Steps


def test_a_closure_is_called_once_with_gradients_on_and_its_loss_returned() -> None:
    def ranks(rank: int) -> None:
        params, twins = make_parameters(PLAIN), make_parameters(PLAIN)
        optimizer = ShardedASGD(named(params), lr=0.1, t0=0)
        reference = torch.optim.ASGD(twins, lr=0.1, t0=0, foreach=False)
        calls = []
        for step in range(6):
            by_rank = random_gradients(PLAIN, 2, step)

            def closure(step: int = step, grads: Any = by_rank[rank]) -> float:
                assert torch.is_grad_enabled()
                calls.append(step)
                optimizer.zero_grad()
                backward(params, grads)
                return float(step)

            with torch.no_grad():
                assert optimizer.step(closure) == step
            for p, *grads in zip(twins, *by_rank, strict=True):
                p.grad = reduce_in_rank_order(grads)
            reference.step()
        assert calls == list(range(6))
        assert all(map(same_bits, params, twins))
        assert optimizer.step() is None

    run_ranks(2, ranks)


def test_step_hooks_run_around_the_step() -> None:
    def ranks(rank: int) -> None:
        params = make_parameters(PLAIN)
        optimizer = ShardedASGD(named(params), lr=0.1)
        seen: list[tuple[str, bool]] = []
        before = params[0].detach().clone()
        optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", same_bits(params[0], before))))
        optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("post", same_bits(params[0], before))))
        backward(params, random_gradients(PLAIN, 2, 0)[rank])
        optimizer.step()
        assert seen == [("pre", True), ("post", False)]

    run_ranks(2, ranks)


def test_state_dict_hooks_run() -> None:
    def alone() -> None:
        optimizer = ShardedASGD(make_parameters(PLAIN))
        seen = []
        optimizer.register_state_dict_pre_hook(lambda o: seen.append("save pre"))
        optimizer.register_state_dict_post_hook(lambda o, sd: seen.append("save post"))
        optimizer.register_load_state_dict_pre_hook(lambda o, sd: seen.append("load pre"))
        optimizer.register_load_state_dict_post_hook(lambda o: seen.append("load post"))
        optimizer.load_state_dict(optimizer.state_dict())
        assert seen == ["save pre", "save post", "load pre", "load post"]

    run_alone(alone)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 9], 0.1),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 1e-8, 1.0, 6),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 7),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=20, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 4), lr_scheduler.ExponentialLR(o, 0.9)], [4]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
}


@pytest.mark.parametrize("world_size", [1, 2])
def test_schedulers_act_one_step_late_as_with_torch(world_size: int) -> None:
    def ranks(rank: int) -> None:
        for name, make in SCHEDULERS.items():
            halves = [PLAIN[:2], PLAIN[2:]]
            groups = [{"params": make_parameters(half)} for half in halves]
            groups[1]["lr"] = 0.3
            pair = Pair(groups, lr=0.1, t0=4, lambd=0.01)
            schedulers = [make(pair.optimizer), make(pair.oracle.optimizer)]
            for step in range(15):
                pair.backward(random_gradients(PLAIN, world_size, step))
                pair.step()
                pair.zero_grad()
                for scheduler in schedulers:
                    scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
                pair.check_parameters(f"{name}, step {step}")
            pair.check(name)

    run_ranks(world_size, ranks)


@pytest.mark.parametrize("world_size", [1, 2])
def test_numpy_scalars_are_numbers(world_size: int) -> None:
    """Schedulers that compute with NumPy hand them over."""

    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=np.float64(0.1), t0=np.int64(3), lambd=np.float32(0.01))
        schedulers = [
            lr_scheduler.LambdaLR(optimizer, lambda epoch: np.float32(0.9) ** epoch)
            for optimizer in (pair.optimizer, pair.oracle.optimizer)
        ]
        for step in range(8):
            pair.backward(random_gradients(PLAIN, world_size, step))
            pair.step()
            pair.zero_grad()
            for scheduler in schedulers:
                scheduler.step()
            pair.check(step)

    run_ranks(world_size, ranks)


def test_tensor_lr_may_change_between_steps() -> None:
    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=torch.tensor(0.1), t0=2, lambd=0.01)
        assert isinstance(pair.optimizer.param_groups[0]["lr"], torch.Tensor)
        for step in range(15):
            if step == 5:
                for optimizer in (pair.optimizer, pair.oracle.optimizer):
                    optimizer.param_groups[0]["lr"] = torch.tensor(0.03)
            if step == 9:  # as a scheduler does it
                for optimizer in (pair.optimizer, pair.oracle.optimizer):
                    optimizer.param_groups[0]["lr"].fill_(0.2)
            pair.backward(random_gradients(PLAIN, 2, step))
            pair.step()
            pair.zero_grad()
            pair.check_parameters(step)
        pair.check()

    run_ranks(2, ranks)


# Gradients


@pytest.mark.parametrize("world_size", [1, 2])
def test_zero_grad_both_ways(world_size: int) -> None:
    def ranks(rank: int) -> None:
        params = make_parameters(PLAIN)
        pair = Pair(params, lr=0.1, t0=1, lambd=0.1)
        for step, set_to_none in enumerate([True, False, False, True, False, True]):
            pair.backward(random_gradients(PLAIN, world_size, step, exact=True))
            pair.step()
            pair.zero_grad(set_to_none)
            assert all((p.grad is None) == set_to_none for p in params)
        pair.backward(random_gradients(PLAIN, world_size, 99))
        pair.zero_grad(set_to_none=False)
        pair.step()  # zero gradients shrink the parameters: not nothing
        pair.check()

    run_ranks(world_size, ranks)


def test_the_modules_zero_grad_and_none_by_hand_drop_the_gradient() -> None:
    def ranks(rank: int) -> None:
        model = torch.nn.ParameterList(make_parameters(PLAIN))
        pair = Pair(list(model), lr=0.1, t0=0)
        for step in range(4):
            pair.backward(random_gradients(PLAIN, 2, 50 + step))
            model.zero_grad()
            pair.oracle.zero_grad()
            pair.backward(random_gradients(PLAIN, 2, step))
            pair.step()
            for p in model:
                p.grad = None
            pair.oracle.zero_grad()
            pair.check_parameters(step)

    run_ranks(2, ranks)


def test_a_step_without_zero_grad_uses_the_gradient_again() -> None:
    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
        pair.backward(random_gradients(PLAIN, 2, 0))
        for _ in range(4):
            pair.step()
        pair.check()

    run_ranks(2, ranks)


def test_without_any_gradient_one_rank_steps_as_torch_does() -> None:
    def alone() -> None:
        params = make_parameters(PLAIN)
        optimizer = ShardedASGD(params, lr=0.1)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        assert all(map(same_bits, params, before))
        twins = make_parameters(PLAIN)
        reference = torch.optim.ASGD(twins, lr=0.1, foreach=False)
        check_dense_state(optimizer.full_state_dict(), reference)

    run_alone(alone)


def test_on_one_rank_the_gradients_stay_plain_tensors() -> None:
    def ranks(rank: int = 0) -> None:
        params = make_parameters(PLAIN)
        optimizer = ShardedASGD(params, lr=0.1)
        grads = random_gradients(PLAIN, 1, 0)[0]
        backward(params, grads)
        assert all(type(p.grad) is torch.Tensor and same_bits(p.grad, g) for p, g in zip(params, grads, strict=True))
        optimizer.step()
        assert all(same_bits(p.grad, g) for p, g in zip(params, grads, strict=True)), "step() changed a gradient"

    run_alone(ranks)
    run_ranks(1, ranks)


@pytest.mark.parametrize("gradients", ["local", "reduced"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gradients_assigned_by_hand(world_size: int, gradients: str) -> None:
    def ranks(rank: int) -> None:
        params, twins = make_parameters(MIXED), make_parameters(MIXED)
        optimizer = ShardedASGD(named(params), lr=0.1, t0=2, gradients=gradients)
        reference = torch.optim.ASGD(twins, lr=0.1, t0=2, foreach=False)
        for step in range(12):
            by_rank = random_gradients(MIXED, world_size, step)
            mean = [reduce_in_rank_order(grads) for grads in zip(*by_rank, strict=True)]
            for p, twin, own, g in zip(params, twins, by_rank[rank], mean, strict=True):
                p.grad = own.clone() if gradients == "local" else g.clone()
                twin.grad = g.clone()
            optimizer.step()
            reference.step()
            assert all(map(same_bits, params, twins)), step
        full = optimizer.full_state_dict()
        if rank == 0:
            check_dense_state(full, reference)

    run_ranks(world_size, ranks)


def test_some_gradients_by_hand_and_some_by_backward() -> None:
    def ranks(rank: int) -> None:
        params = make_parameters(PLAIN)
        pair = Pair(params, lr=0.1, t0=2)
        for step in range(6):
            by_rank = random_gradients(PLAIN, 2, step)
            pair.oracle.backward(by_rank)
            own = list(by_rank[rank])
            params[step % 5].grad, own[step % 5] = own[step % 5].clone(), None
            backward(params, own)
            pair.step()
            pair.zero_grad()
            pair.check_parameters(step)

    run_ranks(2, ranks)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_conjugated_gradient(world_size: int) -> None:
    """Lazily conjugated, as autograd makes them; torch.optim.ASGD cannot take it by hand."""

    def ranks(rank: int) -> None:
        specs = [Spec((5,), torch.complex64), Spec((3, 4), torch.complex64)]
        pair = Pair(make_parameters(specs), lr=0.1, t0=1)
        for step in range(4):
            by_rank = random_gradients(specs, world_size, step)
            pair.oracle.backward(by_rank)
            for p, g in zip(pair.params, by_rank[rank], strict=True):
                p.grad = g.conj().resolve_conj().conj()
                assert p.grad.is_conj()
            pair.step()
            pair.zero_grad()
            pair.check(step)

    run_ranks(world_size, ranks)


@pytest.mark.parametrize("by", ["step", "averaged_parameters"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_backward_through_weights_that_have_changed_is_noticed(world_size: int, by: str) -> None:
    """As with torch's optimizers, autograd refuses to compute with the new values of what it saved."""

    def ranks(rank: int) -> None:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        optimizer = ShardedASGD(model.named_parameters(), lr=0.1, t0=0)
        for _ in range(3):
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        output = model(torch.ones(1, 4))
        output.sum().backward(retain_graph=True)
        if by == "step":
            optimizer.step()
            stale = message_of(lambda: output.sum().backward(), RuntimeError)
        else:
            with optimizer.averaged_parameters():
                stale = message_of(lambda: output.sum().backward(), RuntimeError)
        assert "inplace operation" in stale, stale

    run_ranks(world_size, ranks)


# Tied and doubled parameters, several optimizers, copies


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
            params = make_parameters(PLAIN[:2], number)
            optimizer = ShardedASGD(named(params), lr=0.1)
            loop = [optimizer]
            loop.append(loop)  # only the garbage collector frees it
            backward(params, [torch.ones_like(p) for p in params])
            optimizer.step()
            if rank == 0:
                del optimizer, loop
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


def test_repr_says_what_it_is() -> None:
    def alone() -> None:
        text = repr(ShardedASGD(make_parameters(PLAIN), lr=0.125))
        assert "ShardedASGD" in text and "lr: 0.125" in text

    run_alone(alone)


# What a step costs


class Operators(TorchDispatchMode):
    """Counts the operators that reach a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


STEP_MODES = [(1, "local"), (2, "local"), (1, "reduced"), (2, "reduced")]


@pytest.mark.parametrize(("world_size", "gradients"), STEP_MODES)
def test_a_step_costs_no_more_operators_for_a_thousand_parameters_and_no_sync(world_size: int, gradients: str) -> None:
    def count(number: int, averaging: bool) -> Counter[str]:
        specs = [Spec((64,))] * number
        params = make_parameters(specs)
        optimizer = ShardedASGD(named(params), lr=0.1, t0=0 if averaging else 1e6, gradients=gradients)
        for step in range(5):
            optimizer.zero_grad()
            backward(params, random_gradients(specs, 1, step)[0])
            with Operators() as operators:
                optimizer.step()
        return operators.seen

    def ranks(rank: int) -> None:
        for averaging in (False, True):
            few, many = count(10, averaging), count(1000, averaging)
            syncs = {name: n for name, n in many.items() if "_local_scalar_dense" in name or "is_nonzero" in name}
            assert not syncs, f"host syncs in a step: {syncs}"
            growth = {name: n - few[name] for name, n in many.items() if n > few[name]}
            assert sum(many.values()) <= sum(few.values()) + 60, f"grows with the parameters: {growth}"

    run_ranks(world_size, ranks)


def test_backward_costs_no_host_sync() -> None:
    def ranks(rank: int) -> None:
        specs = [Spec((64,))] * 20
        params = make_parameters(specs)
        optimizer = ShardedASGD(named(params), lr=0.1)
        backward(params, random_gradients(specs, 1, 0)[0])
        optimizer.step()
        optimizer.zero_grad()
        with Operators() as operators:
            backward(params, random_gradients(specs, 1, 1)[0])
            optimizer.step()
        assert not [name for name in operators.seen if "_local_scalar_dense" in name]

    run_ranks(2, ranks)


def test_looking_through_the_state_costs_the_same_for_every_parameter() -> None:
    def count(number: int) -> int:
        params = make_parameters([Spec((4,))] * number)
        optimizer = ShardedASGD(named(params), lr=0.1, t0=0)
        backward(params, [torch.ones(4)] * number)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        with Operators() as operators:
            entries = dict(optimizer.state.items())
        assert len(entries) == number
        return sum(operators.seen.values())

    def ranks(rank: int) -> None:
        few, many = count(20), count(200)
        assert many <= 10 * few + 20, f"{few} operators for 20 parameters, {many} for 200"

    run_ranks(2, ranks)


# Balance and inertness


def owned(state: dict[str, Any]) -> int:
    """How many elements of ax this rank holds, read from the sharded state dict as DCP reads it."""
    return sum(owned_of(entry["ax"]) for entry in state["state"].values())


def owned_of(ax: torch.Tensor) -> int:
    chunks = ax.__create_chunk_list__()
    return sum(torch.Size(chunk.sizes).numel() for chunk in chunks)


def test_shards_are_balanced() -> None:
    def ranks(rank: int) -> int:
        params = make_parameters([Spec((1000, 1000)), Spec((1000,)), Spec((1000,)), Spec((10,))])
        optimizer = ShardedASGD(named(params), lr=0.1)
        assert [entry["ax"].shape for entry in optimizer.state_dict()["state"].values()] == [p.shape for p in params]
        return owned(optimizer.state_dict())

    each = run_ranks(3, ranks)
    assert sum(each) == 1002010
    assert max(each) - min(each) <= 3 * 32, each


def looks(optimizer: ShardedASGD, model: torch.nn.Module) -> Iterator[Callable[[], object]]:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    yield optimizer.state_dict
    yield optimizer.full_state_dict
    yield lambda: get_optimizer_state_dict(model, optimizer)
    yield lambda: optimizer.zero_grad()


@pytest.mark.parametrize("gradients", ["local", "reduced"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_looking_at_the_state_before_the_first_step_changes_nothing(world_size: int, gradients: str) -> None:
    def ranks(rank: int) -> None:
        for which in range(4):
            model = torch.nn.ParameterList(make_parameters(PLAIN))
            pair = Pair(list(model), lr=0.1, t0=0, gradients=gradients)
            assert pair.optimizer.state, "DCP runs a fake step on an optimizer with empty state"
            list(looks(pair.optimizer, model))[which]()
            assert all(p.grad is None for p in model)
            assert pair.optimizer.param_groups[0]["lr"] == 0.1
            for step in range(6):
                pair.backward(random_gradients(PLAIN, world_size, step))
                pair.step()
                if step == 3:
                    list(looks(pair.optimizer, model))[which]()
                pair.zero_grad()
                pair.check_parameters((which, step))
            pair.check(which)

    run_ranks(world_size, ranks)


def test_an_empty_parameter_list_is_refused() -> None:
    def alone() -> None:
        assert "empty" in message_of(lambda: ShardedASGD([], lr=0.1), ValueError)

    run_alone(alone)
    run_ranks(2, lambda rank: alone())


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
