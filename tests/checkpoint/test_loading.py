"""load_state_dict: all ranks refuse what one cannot load, and nothing has changed; what is loaded costs no more."""

import copy
import pathlib
from typing import Any

import pytest
import torch

from dist_asgd import EMA, Checkpointer, ShardedASGD, ShardedAverages, Uniform
from dist_asgd.kernels.averaging import move_averages_
from dist_asgd.kernels.selfcheck import averages_match_operators
from tests.support import memory
from tests.support.oracle import PLAIN, Pair, Spec, backward, make_parameters, named, random_gradients, same_bits
from tests.support.ranks import message_of, run_ranks


def spoiled(state: dict[str, Any], how: str) -> dict[str, Any]:
    entries = {k: dict(v) for k, v in state["state"].items()}
    groups = [dict(g) for g in state["param_groups"]]
    if how == "another number of groups":
        groups.append({**groups[0], "params": []})
    elif how == "another number of parameters":
        groups[0]["params"] = groups[0]["params"][:-1]
    elif how == "another shape":
        entries[3]["ax"] = torch.zeros(256)
    elif how == "no ax":
        del entries[3]["ax"]
    elif how == "no eta":
        del entries[3]["eta"]
    elif how == "step is a vector":
        entries[3]["step"] = torch.zeros(4)
    elif how.startswith("a number:"):
        _, key, value = how.split()
        entries[3][key] = torch.tensor(complex(value) if value == "1j" else float(value))
    elif how.startswith("ax: "):
        entries[3]["ax"] = WRONG_AX[how](entries[3]["ax"])
    elif how == "state of strangers":
        entries["other.weight"] = entries.pop(3)
    elif how == "SGD's":
        return torch.optim.SGD(make_parameters(PLAIN), lr=0.1).state_dict()
    elif how == "another optimizer's state":
        entries = {
            k: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)} for k in entries
        }
    return {"state": entries, "param_groups": groups}


WRONG_AX: dict[str, Any] = {
    "ax: None": lambda ax: None,
    "ax: on meta": lambda ax: torch.empty(ax.shape, device="meta"),
    "ax: sparse": lambda ax: torch.zeros(ax.shape).to_sparse(),
    "ax: integers": lambda ax: torch.zeros(ax.shape, dtype=torch.int64),
    "ax: complex": lambda ax: torch.zeros(ax.shape, dtype=torch.complex64),
    "ax: wider": lambda ax: torch.zeros(ax.shape, dtype=torch.float64),
}
HOWS = [
    *WRONG_AX,
    *(f"a number: {key} {value}" for key in ("step", "eta", "mu") for value in ("nan", "inf", "-1", "1j")),
    "state of strangers",
    "SGD's",
    "another number of groups",
    "another number of parameters",
    "another shape",
    "no ax",
    "no eta",
    "step is a vector",
    "another optimizer's state",
]


@pytest.mark.parametrize("kind", ["sharded", "dense"])
def test_a_wrong_state_dict_is_refused_and_changes_nothing(kind: str) -> None:
    def ranks(rank: int) -> list[str]:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
        for step in range(5):
            pair.backward(random_gradients(PLAIN, 2, step))
            pair.step()
            pair.zero_grad()
        good = pair.optimizer.state_dict() if kind == "sharded" else pair.oracle.optimizer.state_dict()
        texts = []
        for how in HOWS:
            text = message_of(
                lambda how=how: pair.optimizer.load_state_dict(spoiled(good, how)), ValueError, RuntimeError, KeyError
            )
            if how in ("another shape", "no ax", "no eta", "step is a vector") or ":" in how:
                assert "layer3.weight" in text or "3" in text, f"{how}: {text}"
            texts.append(text)
            pair.check(how)
        pair.backward(random_gradients(PLAIN, 2, 9))
        pair.step()
        pair.check()
        return texts

    a, b = run_ranks(2, ranks)
    assert a == b


def test_a_state_dict_spoiled_on_one_rank_is_refused_on_all() -> None:
    def ranks(rank: int) -> str:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
        pair.backward(random_gradients(PLAIN, 2, 0))
        pair.step()
        pair.zero_grad()
        state = pair.optimizer.state_dict()
        bad = spoiled(state, "no eta") if rank == 1 else state
        text = message_of(lambda: pair.optimizer.load_state_dict(bad))
        pair.check("after the refusal")
        return text

    a, b = run_ranks(2, ranks)
    assert a == b and "rank 1" in a


def test_a_state_dict_that_fits_on_one_rank_only_is_loaded_on_none() -> None:
    def ranks(rank: int) -> str:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
        for step in range(3):
            pair.backward(random_gradients(PLAIN, 2, step))
            pair.step()
            pair.zero_grad()
        state = spoiled(copy.deepcopy(pair.optimizer.state_dict()), "no eta" if rank == 1 else "nothing")
        state["param_groups"][0]["lr"] = 0.7
        state["state"][0]["step"] = torch.tensor(77.0)
        text = message_of(lambda: pair.optimizer.load_state_dict(state), ValueError)
        assert pair.optimizer.param_groups[0]["lr"] == 0.1
        pair.check("after the refusal")
        return text

    a, b = run_ranks(2, ranks)
    assert a == b and "rank 1" in a


NO_STATE_DICTS = [
    *(None, {}, {"state": {}}, {"param_groups": []}),
    *({"state": [], "param_groups": []}, {"state": {}, "param_groups": None}, {"state": {0: "ax"}, "param_groups": []}),
    {"state": {}, "param_groups": [0]},
]


@pytest.mark.parametrize("given", NO_STATE_DICTS, ids=str)
def test_a_state_dict_that_only_one_rank_has_read_is_refused_on_all(given: Any) -> None:
    def ranks(rank: int) -> str:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
        state = pair.optimizer.state_dict()
        text = message_of(lambda: pair.optimizer.load_state_dict(given if rank == 1 else state), ValueError, TypeError)
        pair.backward(random_gradients(PLAIN, 2, 0))
        pair.step()
        pair.check()
        return text

    a, b = run_ranks(2, ranks, timeout=20)
    assert a == b and "rank 1" in a and "state dict" in a


@pytest.mark.parametrize("how", ["another step", "no state"])
def test_ranks_that_load_different_state_dicts_are_told(how: str) -> None:
    """Each fits by itself: two checkpoints, say, the newer of which one rank does not see yet."""

    def ranks(rank: int) -> str:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
        dicts = []
        for step in range(4):
            pair.backward(random_gradients(PLAIN, 2, step))
            pair.step()
            pair.zero_grad()
            dicts.append(copy.deepcopy(pair.optimizer.state_dict()))
        other = dicts[1] if how == "another step" else {**dicts[3], "state": {}}
        text = message_of(lambda: pair.optimizer.load_state_dict(other if rank == 1 else dicts[3]), ValueError)
        pair.check("after the refusal")
        return text

    a, b = run_ranks(2, ranks, timeout=20)
    assert a == b and "layer" in a and "rank 1" in a and "step" in a


@pytest.mark.parametrize("look", [None, "state_dict", "full_state_dict", "state"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_masters_survive_when_the_optimizer_is_loaded_before_the_model(world_size: int, look: str | None) -> None:
    specs = [Spec((33,), torch.bfloat16), Spec((5, 7), torch.float16)]

    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(specs), lr=0.05, t0=1)
        for step in range(6):
            pair.backward(random_gradients(specs, world_size, step))
            pair.step()
            pair.zero_grad()
        state, weights = copy.deepcopy(pair.optimizer.state_dict()), [p.detach().clone() for p in pair.params]
        params = make_parameters(specs, seed=5)
        again = ShardedASGD(named(params), lr=0.05, t0=1)
        again.load_state_dict(state)
        if look == "state":
            _ = [again.state[p] for p in params]
        elif look is not None:
            getattr(again, look)()
        with torch.no_grad():
            for p, saved in zip(params, weights, strict=True):
                p.copy_(saved)
        for step in range(6, 9):
            by_rank = random_gradients(specs, world_size, step)
            pair.backward(by_rank)
            backward(params, by_rank[rank])
            for optimizer in (pair, again):
                optimizer.step()
                optimizer.zero_grad()
            assert all(map(same_bits, params, pair.params)), step
            pair.check(step)

    run_ranks(world_size, ranks)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_checkpoint_from_before_averaging_costs_no_memory_for_ever(world_size: int) -> None:
    """Also where a parameter of the bucket is frozen, and so takes no step."""

    def ranks(rank: int) -> None:
        params = make_parameters(PLAIN)
        params[1].requires_grad_(False)
        optimizer = ShardedASGD(named(params), lr=0.1)
        for step in range(4):
            if step == 2:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            grads = random_gradients(PLAIN, world_size, step)[rank]
            backward(params, [None if index == 1 else g for index, g in enumerate(grads)])
            optimizer.step()
            optimizer.zero_grad()
        assert memory.reachable(optimizer, torch.nn.ParameterList(params)) < 1024

    run_ranks(world_size, ranks)


def test_the_default_device_does_not_matter(tmp_path: pathlib.Path) -> None:
    def ranks(rank: int) -> list[list[float]]:
        torch.set_default_device("meta")
        assert averages_match_operators(move_averages_, torch.device("cpu"), torch.float32, torch.float32)
        params = [torch.nn.Parameter(torch.ones(5, device="cpu"))]
        optimizer = ShardedASGD([("p", params[0])], lr=0.1, average={"mean": Uniform(), "ema": EMA(0.5)})
        averages = ShardedAverages([("p", params[0])], EMA(0.9), optimizer=optimizer)
        state = {"parameter": params[0].detach(), "optimizer": optimizer, "averages": averages}
        for _ in range(3):
            params[0].grad = torch.ones(5, device="cpu")
            optimizer.step()
        assert optimizer.state_dict()["state"][0]["step"].item() == 3
        found = []
        for _ in range(2):
            with optimizer.averaged_parameters("mean"):
                found.append(params[0].tolist())
            with averages.averaged_parameters():
                found.append(params[0].tolist())
            with Checkpointer(tmp_path) as checkpoints:
                checkpoints.load(state)
                checkpoints.save(1, state, wait=False)
        assert found[:2] == found[2:]
        return found

    first, other = run_ranks(2, ranks)
    assert first == other
