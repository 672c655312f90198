"""What a step and a look at the state cost: operators, synchronisations, shares, and that looking changes nothing."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dist_asgd import ShardedASGD
from tests.support.oracle import PLAIN, Pair, Spec, backward, make_parameters, named, random_gradients
from tests.support.ranks import run_ranks

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
