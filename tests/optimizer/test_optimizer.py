"""The habits of torch.optim: groups, closures, schedulers, hooks, zero_grad, gradients assigned by hand."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from dist_asgd import ShardedASGD
from tests.support.oracle import (
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
from tests.support.ranks import message_of, run_alone, run_ranks

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


def test_repr_says_what_it_is() -> None:
    def alone() -> None:
        text = repr(ShardedASGD(make_parameters(PLAIN), lr=0.125))
        assert "ShardedASGD" in text and "lr: 0.125" in text

    run_alone(alone)


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
