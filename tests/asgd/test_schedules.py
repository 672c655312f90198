"""When a learning rate acts, and what the step size falls by: ``lr_on_time`` and ``eta_decay``, over whole runs.

torch.optim.ASGD computes the step size at the end of the step before, from the lr of that time. With the lr shifted by
one step, and the first step size put into its state, it is the oracle of what acts on time.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import dist_asgd
from dist_asgd import ShardedASGD
from tests.support.failures import one_message
from tests.support.oracle import PLAIN, Pair, check_dense_state, make_parameters, named, random_gradients, same_bits
from tests.support.ranks import message_of, run_alone, run_ranks

STEPS = 24
OPTIONS: dict[str, Any] = {"lr": 0.1, "lambd": 0.01, "t0": 3, "weight_decay": 0.1, "bucket_bytes": 1024}
LENGTHS = (70, 35, 68, 5, 77)  # of batches, in turns

Schedule = Callable[[ShardedASGD], Iterator[None]]  # goes on with each step


def of_torch(make: Callable[[ShardedASGD], Any]) -> Schedule:
    def schedule(optimizer: ShardedASGD) -> Iterator[None]:
        scheduler = make(optimizer)
        while True:
            yield
            scheduler.step()

    return schedule


def by_length(optimizer: ShardedASGD) -> Iterator[None]:
    """As AWD-LSTM does: each batch scales the lr for its own step."""
    group = optimizer.param_groups[0]
    for step in range(STEPS):
        lr = group["lr"]
        group["lr"] = lr * LENGTHS[step % len(LENGTHS)] / 70
        yield
        group["lr"] = lr
    yield


SCHEDULES: dict[str, Schedule] = {
    "StepLR": of_torch(lambda optimizer: lr_scheduler.StepLR(optimizer, 4, 0.5)),
    "LinearLR": of_torch(lambda optimizer: lr_scheduler.LinearLR(optimizer, 1e-8, total_iters=10)),
    "OneCycleLR": of_torch(
        lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=STEPS + 1, cycle_momentum=False)
    ),
    "LambdaLR": of_torch(lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) ** -0.5)),
    "by length": by_length,
}


def put_gradients(params: Sequence[torch.Tensor], step: int) -> None:
    for p, g in zip(params, random_gradients(PLAIN, 1, step)[0], strict=True):
        p.grad = g


def lr_of(optimizer: ShardedASGD) -> Any:
    lr = optimizer.param_groups[0]["lr"]
    return lr.clone() if isinstance(lr, torch.Tensor) else lr


def build(**options: Any) -> tuple[list[torch.nn.Parameter], ShardedASGD]:
    params = make_parameters(PLAIN)
    return params, ShardedASGD(named(params), gradients="reduced", **(OPTIONS | options))


def shifted(lrs: Sequence[Any]) -> tuple[list[torch.nn.Parameter], torch.optim.ASGD]:
    """torch, trained with ``lrs``, each of which acts in its own step; the last of them is for a next one."""
    params = make_parameters(PLAIN)
    options = {key: value for key, value in OPTIONS.items() if key != "bucket_bytes"}
    optimizer = torch.optim.ASGD(params, **options, foreach=False)
    for p in params:
        first = torch.as_tensor(lrs[0], dtype=torch.float32).clone()
        optimizer.state[p] = {"step": torch.zeros(()), "eta": first, "mu": torch.ones(()), "ax": torch.zeros_like(p)}
    for step, following in enumerate(lrs[1:]):
        optimizer.param_groups[0]["lr"] = following
        put_gradients(params, step)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_every_schedule_acts_on_time(world_size: int, lr: Any) -> None:
    def ranks(rank: int) -> None:
        for name, schedule in SCHEDULES.items():
            params, optimizer = build(lr_on_time=True, lr=lr if isinstance(lr, float) else lr.clone())
            lrs, turns = [], schedule(optimizer)
            for step in range(STEPS):
                next(turns)
                lrs.append(lr_of(optimizer))
                put_gradients(params, step)
                optimizer.step()
            next(turns)
            lrs.append(lr_of(optimizer))
            expected, oracle = shifted(lrs)
            assert len({float(used) for used in lrs}) > 4, lrs
            assert all(map(same_bits, params, expected)), name
            full = optimizer.full_state_dict()
            if rank == 0:
                check_dense_state(full, oracle, name)

    run_ranks(world_size, ranks)


def test_with_a_constant_lr_on_time_has_the_bits_of_torch() -> None:
    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.1, lambd=0.01, t0=3)
        pair.optimizer.param_groups[0]["lr_on_time"] = True  # as options of groups are set
        pair.train(range(STEPS))

    run_ranks(2, ranks)


def test_groups_have_their_own() -> None:
    """The lr of one step reaches the group that is on time in that step, the other, as in torch, in the next."""

    def alone() -> None:
        params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
        groups = [{"params": params[:1], "lr_on_time": True}, {"params": params[1:]}]
        optimizer = ShardedASGD(groups, lr=1.0, lambd=0.0)
        for lr, expected in ((1.0, (1.0, 1.0)), (0.5, (0.5, 1.0)), (0.25, (0.25, 0.5))):
            before = [p.detach().clone() for p in params]
            for group, p in zip(optimizer.param_groups, params, strict=True):
                group["lr"], p.grad = lr, torch.ones(3)
            optimizer.step()
            assert tuple((old - p)[0].item() for old, p in zip(before, params, strict=True)) == expected

    run_alone(alone)


@pytest.mark.parametrize("world_size", [1, 3])
def test_eta_decay_and_lambd_are_apart(world_size: int) -> None:
    """Each by its formula, computed here in double."""

    def ranks(rank: int) -> None:
        for lambd, eta_decay in ((0.0, 0.3), (0.2, 0.0), (0.2, 0.3), (0.2, None)):
            p = torch.nn.Parameter(torch.linspace(-1, 1, 67, dtype=torch.float64))
            expected, decay = p.detach().clone(), lambd if eta_decay is None else eta_decay
            options = {"lr": 0.1, "lambd": lambd, "eta_decay": eta_decay, "gradients": "reduced"}
            optimizer = ShardedASGD([p], **options)
            for step in range(STEPS):
                p.grad = torch.full_like(p, 0.5)
                optimizer.step()
                eta = 0.1 / (1 + decay * 0.1 * step) ** 0.75
                expected = expected * (1 - lambd * eta) - 0.5 * eta
                torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-7)  # eta is rounded to fp32

    run_ranks(world_size, ranks)


def test_none_follows_lambd() -> None:
    """As it is in torch, and with its bits, as where both are the same number."""

    def ranks(rank: int) -> None:
        for options in ({}, {"eta_decay": 0.02}):
            pair = Pair(make_parameters(PLAIN), lr=0.1, lambd=0.02, t0=2, **options)
            pair.train(range(6))
            pair.set_group(0, lambd=0.3)
            if options:
                pair.set_group(0, eta_decay=0.3)
            pair.train(range(6, 12))

    run_ranks(2, ranks)


def test_state_dicts_go_to_torch_and_back() -> None:
    def alone() -> None:
        torchs = torch.optim.ASGD(named(make_parameters(PLAIN))).state_dict()["param_groups"][0]
        assert build()[1].state_dict()["param_groups"][0].keys() == torchs.keys()
        params, optimizer = build(lr_on_time=True, eta_decay=0.5)
        put_gradients(params, 0)
        optimizer.step()
        state = optimizer.state_dict()
        assert state["param_groups"][0]["lr_on_time"] is True and state["param_groups"][0]["eta_decay"] == 0.5
        twins = make_parameters(PLAIN)
        theirs = torch.optim.ASGD(twins, foreach=False)
        theirs.load_state_dict(state)
        put_gradients(twins, 1)
        theirs.step()
        for key in ("lr_on_time", "eta_decay"):  # as torch's own state dicts are
            state["param_groups"][0].pop(key)
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["lr_on_time"] is True and optimizer.param_groups[0]["eta_decay"] == 0.5
        state["param_groups"][0]["eta_decay"] = -1.0
        assert "eta_decay" in message_of(lambda: optimizer.load_state_dict(state), ValueError)

    run_alone(alone)


@pytest.mark.parametrize("saved_by", ["ShardedASGD", "torch"])
def test_a_checkpoint_without_these_options_leaves_them(tmp_path: Path, saved_by: str) -> None:
    def alone() -> None:
        params, optimizer = build()
        if saved_by == "torch":
            optimizer = torch.optim.ASGD(named(params), lr=0.3)
        put_gradients(params, 0)
        optimizer.step()
        dist_asgd.save(str(tmp_path / "c"), {"optimizer": optimizer})
        _, other = build(lr_on_time=True, eta_decay=0.5)
        dist_asgd.load(str(tmp_path / "c"), {"optimizer": other})
        group = other.param_groups[0]
        assert group["lr_on_time"] is True and group["eta_decay"] == 0.5
        assert group["lr"] == optimizer.param_groups[0]["lr"]

    run_alone(alone)


@pytest.mark.parametrize("way", ["state dict", "checkpoint"])
def test_a_resumed_run_has_the_bits_of_one_without_a_stop(tmp_path: Path, way: str) -> None:
    """And an lr that is set after loading acts at once."""

    def ranks(rank: int) -> None:
        whole, optimizer = build(lr_on_time=True, eta_decay=0.3)
        for step in range(STEPS):
            if step == 10:
                copies = [p.detach().clone() for p in whole]
                other_params, other = build(**({} if way == "state dict" else {"lr_on_time": True, "eta_decay": 0.1}))
                if way == "state dict":
                    other.load_state_dict(optimizer.state_dict())
                else:
                    dist_asgd.save(str(tmp_path / "c"), {"optimizer": optimizer})
                    dist_asgd.load(str(tmp_path / "c"), {"optimizer": other})
                with torch.no_grad():
                    for p, copy in zip(other_params, copies, strict=True):
                        p.copy_(copy)
            for each, params in [(optimizer, whole), *([(other, other_params)] if step >= 10 else [])]:
                each.param_groups[0]["lr"] = 0.1 / (1 + step)
                put_gradients(params, step)
                each.step()
        assert all(map(same_bits, whole, other_params))
        groups = [each.param_groups[0] for each in (optimizer, other)]
        assert all(group["lr_on_time"] and group["eta_decay"] == 0.3 for group in groups)

    run_ranks(2, ranks)


def test_ranks_that_are_not_on_time_together() -> None:
    def ranks(rank: int) -> str:
        params, optimizer = build()
        if rank == 1:
            optimizer.param_groups[0]["lr_on_time"] = True
        put_gradients(params, 0)
        return message_of(optimizer.step, ValueError)

    one_message(run_ranks(2, ranks), "lr_on_time of group 0", "rank 1")


@pytest.mark.parametrize("on_time", [False, True])
def test_an_lr_in_a_tensor_is_read_as_often_for_many_buckets_as_for_one(on_time):
    reads = []

    class Counted(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func in (torch.Tensor.item, torch.Tensor.__float__):
                reads.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    params = [torch.nn.Parameter(torch.randn(40)) for _ in range(5)]
    lr = torch.tensor(0.1).as_subclass(Counted)
    optimizer = ShardedASGD(params, lr=lr, bucket_bytes=1, lr_on_time=on_time)
    for step in range(3):
        torch.stack(params).sum().backward()
        reads.clear()
        optimizer.step()
        # The check of the options reads the lr. Each eta is read, and the first one is the lr.
        assert len(reads) == (3 if on_time and step > 0 else 2)
