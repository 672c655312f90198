"""The same bits as torch.optim.ASGD(foreach=False) fed the same reduced gradients: whole runs, on 1 to 4 ranks."""

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from dist_asgd import ShardedASGD
from tests.support.oracle import (
    MIXED,
    PLAIN,
    Grads,
    Messenger,
    Pair,
    Spec,
    make_parameters,
    model_gradients,
    random_gradients,
    reduce_in_rank_order,
    same_bits,
    tokens_of,
)
from tests.support.ranks import run_alone, run_ranks

# Where somebody else reduces the gradients, the number of ranks only cuts the shards.
runs = pytest.mark.parametrize(
    ("world_size", "gradients"),
    [(1, "local"), (2, "local"), (3, "local"), (4, "local"), (1, "reduced"), (3, "reduced")],
)


@dataclass(frozen=True)
class Case:
    options: dict[str, Any]
    specs: tuple[Spec, ...] = PLAIN
    groups: tuple[dict[str, Any], ...] = ({},)  # parameters are dealt out to them in turn
    steps: int = 24
    missing: float = 0.0
    bucket_bytes: tuple[int, ...] = (25 * 2**20,)


LONG = (
    Case({"lr": 0.05, "t0": 0}),
    Case({"lr": 0.05, "t0": 3, "lambd": 0.01, "weight_decay": 0.1, "alpha": 0.5}),
    Case({"lr": 0.02, "t0": 3, "maximize": True, "lambd": 0.02, "weight_decay": 0.01}, missing=0.3),
    Case({"lr": 0.03, "t0": 1e6, "lambd": 0.02}, missing=0.1, bucket_bytes=(1024,)),
    Case(
        {"lr": 0.05, "t0": 0, "lambd": 0.0, "alpha": 1.0},
        specs=MIXED,
        groups=({}, {"lr": 0.01, "t0": 3}, {"weight_decay": 0.05, "maximize": True, "alpha": 0.6, "lambd": 0.03}),
        bucket_bytes=(1024,),
    ),
)
SHORT = (
    Case({}, specs=MIXED, steps=15),
    Case({"lr": 0.1, "t0": 2.5, "alpha": 0.0}, steps=15),
    Case({"lr": 0.0, "t0": 0}, steps=12),
    Case({"lr": torch.tensor(0.1), "t0": 0, "lambd": 0.01}, steps=15),
    Case({"lr": 0.1, "t0": 3, "lambd": 0.01}, specs=MIXED, steps=20, missing=0.5, bucket_bytes=(64, 4096)),
    Case({"lr": 1e-3, "t0": 0}, specs=(Spec(()),), steps=12),
    Case({"lr": 0.1, "t0": 0}, specs=(Spec((0,)), Spec((2,))), steps=12),
    Case({"lr": 0.1, "t0": 1}, specs=(Spec((3,), torch.complex64),), steps=12),
    Case(
        {"lr": 0.1, "t0": 1},
        specs=(Spec((1000, 40)), Spec((1000,)), Spec((10,))),
        steps=8,
        bucket_bytes=(8192, 25 * 2**20),
    ),
)


def checked_steps(case: Case) -> set[int]:
    """Around the window's opening, where the rule changes, and now and then."""
    return {1, 2, 3, 4, 5, 6, 7, case.steps // 2, case.steps - 1, case.steps}


def run_case(case: Case, gradients: str, seed: int) -> None:
    for bucket_bytes in case.bucket_bytes:
        params = make_parameters(case.specs, seed)
        groups = [{**group, "params": params[i :: len(case.groups)]} for i, group in enumerate(case.groups)]
        order = [i for first in range(len(groups)) for i in range(first, len(params), len(groups))]
        specs = [case.specs[i] for i in order]
        find = case.missing > 0
        pair = Pair(groups, **case.options, gradients=gradients, bucket_bytes=bucket_bytes, find_unused_parameters=find)
        for step in range(1, case.steps + 1):
            pair.backward(random_gradients(specs, pair.world_size, 7919 * seed + step, case.missing))
            pair.step()
            pair.zero_grad()
            where = f"after step {step} of {case.options} {gradients} bucket_bytes={bucket_bytes}"
            if step in checked_steps(case):
                pair.check(where)
            elif step % 10 == 0:
                pair.check_parameters(where)


@runs
def test_long_runs_past_t0_equal_torch(world_size: int, gradients: str) -> None:
    def ranks(rank: int) -> None:
        for seed, case in enumerate(LONG if gradients == "local" else LONG[2:5:2]):
            run_case(case, gradients, seed)

    run_ranks(world_size, ranks, timeout=180)


@runs
def test_odd_shapes_and_options_equal_torch(world_size: int, gradients: str) -> None:
    def ranks(rank: int) -> None:
        for seed, case in enumerate(SHORT):
            run_case(case, gradients, 100 + seed)

    run_ranks(world_size, ranks, timeout=120)


def test_without_torch_distributed_it_equals_torch() -> None:
    def alone() -> None:
        assert not torch.distributed.is_initialized()
        for seed, case in enumerate((*LONG, *SHORT)):
            run_case(case, "local", 200 + seed)

    run_alone(alone)


def test_float64_default_dtype() -> None:
    """torch keeps eta and mu in the default dtype; with float64 they are not rounded to fp32."""

    def alone() -> None:
        torch.set_default_dtype(torch.float64)
        p = make_parameters([Spec((9,), torch.float64)])[0]
        twin = torch.nn.Parameter(p.detach().clone())
        ours = ShardedASGD([p], lr=0.3, lambd=0.01, t0=0)
        theirs = torch.optim.ASGD([twin], lr=0.3, lambd=0.01, t0=0, foreach=False)
        for step in range(20):
            p.grad = random_gradients([Spec((9,), torch.float64)], 1, step)[0][0]
            twin.grad = p.grad.clone()
            ours.step()
            theirs.step()
        assert same_bits(p, twin)

    run_alone(alone)


# Random programs: every call a training loop makes, in any order.


@dataclass
class Program:
    """Random calls. The gradients add up exactly in any order, so the oracle need not know the order."""

    pair: Pair
    specs: list[Spec]
    chance: random.Random
    seed: int
    frozen: set[int] = field(default_factory=set)
    log: list[str] = field(default_factory=list)

    def gradients(self, missing: float) -> list[Grads]:
        self.seed += 1
        made = random_gradients(self.specs, self.pair.world_size, self.seed, missing, exact=True)
        whole = random_gradients(self.specs, self.pair.world_size, self.seed, exact=True)
        # A rank without any gradient makes the others wait for it a few seconds: test_reduction has that, once.
        made = [whole[rank] if all(g is None for g in grads) else grads for rank, grads in enumerate(made)]
        return [[None if g is None else g * 12 / 32 for g in grads] for grads in made]

    def iteration(self, missing: float) -> None:
        pair, chance = self.pair, self.chance
        for _ in range(chance.choice([1, 1, 1, 2, 3])):
            sync = chance.random() < 0.7
            self.log.append(f"backward(sync={sync})")
            pair.backward(self.gradients(missing), sync=sync)
        self.log.append("step")
        pair.step()
        cleared = chance.choice(["none", "none", "none", "zeros", "kept"])
        self.log.append(f"gradients {cleared}")
        if cleared != "kept":
            pair.zero_grad(set_to_none=cleared == "none")
        if cleared == "none":
            self.between_steps()

    def between_steps(self) -> None:
        pair, chance = self.pair, self.chance
        event = chance.choice(
            ["", "", "", "lr", "t0", "freeze", "write", "restart", "group", "state", "average", "now"]
        )
        self.log.append(event)
        group = chance.randrange(len(pair.optimizer.param_groups))
        if event == "lr":
            pair.set_group(group, lr=chance.choice([0.1, 0.05, 0.25]))
        elif event == "t0":
            pair.set_group(group, t0=chance.choice([0, 3, 7.5, 1e6]))
        elif event == "freeze":
            index = chance.randrange(len(self.specs))
            self.frozen ^= {index}
            pair.set_requires_grad(index, index not in self.frozen)
        elif event == "write":
            index = chance.randrange(len(self.specs))
            pair.write(index, self.specs[index].random(torch.Generator().manual_seed(self.seed)))
        elif event == "restart":
            pair.restart()
        elif event == "group" and len(pair.optimizer.param_groups) < 4:
            specs = [Spec((5,)), Spec((2, 3), torch.float64)]
            pair.add_param_group({"params": make_parameters(specs, self.seed), "lr": 0.03, "t0": chance.choice([0, 2])})
            self.specs += specs
        elif event == "state":
            pair.optimizer.state_dict()
        elif event == "average":
            with pair.optimizer.averaged_parameters():
                pass
        elif event == "now":
            self.start_averaging()

    def start_averaging(self) -> None:
        """Only while all parameters have the same number of steps, where "now" has one meaning."""
        states = [self.pair.oracle.optimizer.state.get(p) for p in self.pair.oracle.params]
        steps = {float(state["step"]) if state else 0.0 for state in states}
        if len(steps) == 1:
            self.pair.optimizer.start_averaging()
            for group in self.pair.oracle.optimizer.param_groups:
                group["t0"] = steps.copy().pop()


def run_programs(seeds: range, gradients: str, missing: float) -> None:
    for seed in seeds:
        chance = random.Random(seed)
        specs = [chance.choice([*PLAIN, *MIXED]) for _ in range(chance.randint(1, 6))]
        pair = Pair(
            make_parameters(specs, seed),
            lr=0.1,
            t0=chance.choice([0, 3]),
            lambd=chance.choice([0.0, 0.01]),
            weight_decay=chance.choice([0, 0.1]),
            gradients=gradients,
            bucket_bytes=chance.choice([64, 1024, 25 * 2**20]),
            find_unused_parameters=missing > 0,
        )
        program = Program(pair, specs, chance, 1000 * seed)
        for _ in range(20):
            program.iteration(missing)
            pair.check_parameters(f"in program {seed} {gradients}: {' '.join(program.log)}")
        pair.check(f"at the end of program {seed} {gradients}: {' '.join(program.log)}")


@pytest.mark.parametrize("missing", [0.0, 0.4], ids=["all gradients", "missing gradients"])
@runs
def test_random_programs_equal_torch(world_size: int, gradients: str, missing: float) -> None:
    def ranks(rank: int) -> None:
        run_programs(range(5 if missing else 3), gradients, missing)

    run_ranks(world_size, ranks, timeout=120)


# A model, with and without overlap.


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_overlap_and_bucket_size_leave_the_bits_alone(world_size: int) -> None:
    def train(rank: int, bucket_bytes: int, overlap: bool) -> list[torch.Tensor]:
        model = Messenger()
        optimizer = ShardedASGD(
            model.named_parameters(),
            lr=0.5,
            t0=3,
            lambd=0.01,
            bucket_bytes=bucket_bytes,
            module=model if overlap else None,
        )
        for step in range(10):
            optimizer.zero_grad()
            (model(tokens_of(rank, step)) ** 2).mean().backward()
            optimizer.step()
        optimizer.synchronize()
        return [p.detach().clone() for p in model.parameters()]

    def expected() -> list[torch.Tensor]:
        model = Messenger()
        optimizer = torch.optim.ASGD(model.parameters(), lr=0.5, t0=3, lambd=0.01, foreach=False)
        for step in range(10):
            by_rank = [model_gradients(model, tokens_of(r, step)) for r in range(world_size)]
            for p, *grads in zip(model.parameters(), *by_rank, strict=True):
                p.grad = reduce_in_rank_order(grads)
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    def ranks(rank: int) -> None:
        reference = expected()
        for bucket_bytes in (256, 1024, 25 * 2**20):
            for overlap in (False, True):
                trained = train(rank, bucket_bytes, overlap)
                for index, (ours, theirs) in enumerate(zip(trained, reference, strict=True)):
                    assert same_bits(ours, theirs), f"parameter {index}, bucket_bytes={bucket_bytes}, overlap={overlap}"

    run_ranks(world_size, ranks)
