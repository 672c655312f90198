"""Calls that every rank must make, made by some only or in the wrong world: an error on every rank, never a hang."""

import copy
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dist_asgd import ShardedASGD
from tests.support.oracle import PLAIN, Messenger, Pair, make_parameters, named, random_gradients, same_bits, tokens_of
from tests.support.ranks import message_of, run_alone, run_ranks

SECONDS = 8.0  # an error takes no longer than this, on any rank


def evaluate(optimizer: ShardedASGD) -> None:
    with optimizer.averaged_parameters():
        pass


CALLS: dict[str, Callable[[ShardedASGD], object]] = {
    "step()": lambda optimizer: optimizer.step(),
    "clip_grad_norm_()": lambda optimizer: optimizer.clip_grad_norm_(1.0),
    "averaged_parameters()": evaluate,
    "full_state_dict()": lambda optimizer: optimizer.full_state_dict(),
    "load_state_dict()": lambda optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "add_param_group()": lambda optimizer: optimizer.add_param_group({"params": make_parameters(PLAIN[:1])}),
}


def trained(world_size: int, gradients: str = "local") -> Pair:
    pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0, gradients=gradients)
    pair.train(range(4))
    return pair


@pytest.mark.parametrize("gradients", ["local", "reduced"])
@pytest.mark.parametrize("what", [what for what in CALLS if what != "step()"])
def test_a_call_under_if_rank_0_meets_the_step_of_the_others(what: str, gradients: str) -> None:
    """The commonest mistake in evaluation and saving."""

    def ranks(rank: int) -> str:
        pair = trained(3, gradients)
        before = [p.detach().clone() for p in pair.params]
        by_rank = random_gradients(PLAIN, 3, 9)
        start = time.monotonic()
        if rank == 0:
            text = message_of(lambda: CALLS[what](pair.optimizer), RuntimeError)
        else:
            pair.backward(by_rank)
            text = message_of(pair.optimizer.step, RuntimeError)
        assert time.monotonic() - start < SECONDS
        assert all(map(same_bits, pair.params, before))
        assert len(pair.optimizer.param_groups) == 1
        pair.zero_grad()
        pair.train(range(10, 13))
        return text

    texts = run_ranks(3, ranks)
    assert texts[0] == texts[1] == texts[2]
    assert f"rank 0 called ShardedASGD.{what[:-1]}" in texts[0]
    assert "ranks 1-2 called ShardedASGD.step()" in texts[0], texts[0]


@pytest.mark.parametrize("first", CALLS)
@pytest.mark.parametrize("second", CALLS)
def test_any_two_calls_that_meet_are_named(first: str, second: str) -> None:
    def ranks(rank: int) -> str:
        pair = trained(2)
        pair.backward(random_gradients(PLAIN, 2, 9))
        return message_of(lambda: CALLS[second if rank else first](pair.optimizer), RuntimeError)

    if first < second:
        a, b = run_ranks(2, ranks)
        assert a == b and first[:-1] in a and second[:-1] in a


def test_unscaling_on_one_rank_only_is_named() -> None:
    def ranks(rank: int) -> str:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.zeros(()))
        pair.backward(random_gradients(PLAIN, 2, 0))
        return message_of(lambda: pair.optimizer.step() if rank else scaler.unscale_(pair.optimizer), RuntimeError)

    a, b = run_ranks(2, ranks)
    assert a == b and "unscale_" in a and "step()" in a


# gradients="reduced" that are not


@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_that_nobody_has_reduced(world_size: int) -> None:
    def ranks(rank: int) -> str:
        model = Messenger()
        optimizer = ShardedASGD(model.named_parameters(), lr=0.1, gradients="reduced")
        before = [p.detach().clone() for p in model.parameters()]
        (model(tokens_of(rank, 0)) ** 2).mean().backward()
        text = message_of(optimizer.step, RuntimeError)
        assert all(map(same_bits, model.parameters(), before))
        return text

    texts = run_ranks(world_size, ranks)
    assert all(text == texts[0] for text in texts)
    assert "DistributedDataParallel" in texts[0] and "layers." in texts[0] and "rank 1" in texts[0]


def test_gradients_that_nobody_has_reduced_and_that_add_up_to_zero() -> None:
    """A softmax's do, over its classes."""

    def ranks(rank: int) -> str:
        model = torch.nn.Linear(16, 10)
        optimizer = ShardedASGD(model.named_parameters(), lr=0.1, gradients="reduced")
        chance = torch.Generator().manual_seed(rank)
        x, y = torch.randn(32, 16, generator=chance), torch.randint(10, (32,), generator=chance)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        return message_of(optimizer.step, RuntimeError)

    a, b = run_ranks(2, ranks)
    assert a == b and "DistributedDataParallel" in a


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_that_ddp_has_reduced_pass(dtype: torch.dtype) -> None:
    """Also where they are zero, overflow, or came first in another step than the first."""

    def ranks(rank: int) -> None:
        model = Messenger().to(dtype)
        optimizer = ShardedASGD(model.named_parameters(), lr=0.1, gradients="reduced")
        optimizer.step()  # nothing to compare, nothing to do
        wrapped = DistributedDataParallel(model)
        for step in range(3):
            factor = [float("inf"), 0.0, 1.0][step]
            (factor * wrapped(tokens_of(rank, step)) ** 2).mean().backward()
            if step:
                optimizer.step()
            optimizer.zero_grad()

    run_ranks(2, ranks)


# A world that came too late


def test_torch_distributed_initialized_after_the_optimizer_was_built(tmp_path: Path) -> None:
    script = tmp_path / "late.py"
    script.write_text(
        "import torch, torch.distributed as dist\n"
        "from dist_asgd import ShardedASGD\n"
        "p = torch.nn.Parameter(torch.ones(4))\n"
        "optimizer = ShardedASGD([p], lr=0.1)\n"
        "dist.init_process_group('gloo')\n"
        "(p.sum() * (1 + dist.get_rank())).backward()\n"
        "optimizer.step()\n"
        "assert torch.allclose(p, torch.full((4,), 1 - 0.1 * 1.5), atol=1e-3), p\n"
        "print('averaged over both')\n"
        "dist.destroy_process_group()\n"
    )
    ran = torchrun(script)
    assert ran.stdout.count("averaged over both") == 2, ran
    assert "torchrun started 2 processes, but torch.distributed is not initialized" in ran.stderr
    assert "late.py:4: UserWarning" in ran.stderr, "the warning does not point at the user's line"


def torchrun(script: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran


def test_a_plain_process_is_not_warned() -> None:
    def alone() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ShardedASGD(make_parameters(PLAIN), lr=0.1)
        assert not caught

    run_alone(alone)


def test_one_rank_by_itself_in_a_larger_world() -> None:
    def ranks(rank: int) -> None:
        groups = [dist.new_group([member]) for member in range(2)]
        params, twins = make_parameters(PLAIN, rank), make_parameters(PLAIN, rank)
        optimizer = ShardedASGD(params, lr=0.1, t0=0, process_group=groups[rank])
        reference = torch.optim.ASGD(twins, lr=0.1, t0=0, foreach=False)
        for step in range(3):
            for p, twin, grad in zip(params, twins, random_gradients(PLAIN, 2, step)[rank], strict=True):
                p.grad, twin.grad = grad, grad
            optimizer.step()
            reference.step()
            assert all(map(same_bits, params, twins))

    run_ranks(2, ranks)


def test_the_timeout_is_that_of_the_users_group() -> None:
    def ranks(rank: int) -> None:
        group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
        optimizer = ShardedASGD(named(make_parameters(PLAIN)), lr=0.1, process_group=group)
        if rank == 0:
            start = time.monotonic()
            message_of(optimizer.full_state_dict, RuntimeError)
            assert 1 < time.monotonic() - start < SECONDS
        else:
            time.sleep(5)

    run_ranks(2, ranks)
