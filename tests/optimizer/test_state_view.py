"""``optimizer.state[p]``: what is written to it acts as in torch, or is refused with what to do instead."""

import collections
import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_asgd import EMA, ShardedASGD, Uniform, save
from dist_asgd.checkpoint import CheckpointError
from dist_asgd.sharding.sharded_state import StatePiece
from tests.support.layouts import build, local, named_parameters, train
from tests.support.oracle import Pair, Spec, make_parameters, named, random_gradients, same_bits
from tests.support.ranks import run_ranks

SPECS = [Spec((33, 5)), Spec((9,)), Spec((40, 7), torch.float64)]
T0 = 2
PARAM = 0  # the parameter that is written to


def steps(pair: Pair, world_size: int, numbers: range) -> None:
    for number in numbers:
        pair.backward(random_gradients(SPECS, world_size, number))
        pair.step()
        pair.zero_grad()
        pair.check(number)


def value_of(param: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, param.numel(), dtype=param.dtype).view(param.shape)


def set_item(key: str, value: Any) -> Callable[[Any, torch.Tensor], None]:
    """A write by assignment; torch's own state wants tensors."""
    return lambda optimizer, p: optimizer.state[p].__setitem__(key, torch.tensor(value))


WRITES: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "mu.fill_": lambda optimizer, p: optimizer.state[p]["mu"].fill_(0.3),
    "mu.mul_": lambda optimizer, p: optimizer.state[p]["mu"].mul_(0.5),
    "mu.data": lambda optimizer, p: optimizer.state[p]["mu"].data.fill_(0.3),
    "mu.data =": lambda optimizer, p: setattr(optimizer.state[p]["mu"], "data", torch.tensor(0.3)),
    "mu = in place": lambda optimizer, p: optimizer.state[p]["mu"].__setitem__(..., 0.25),
    "a view of mu": lambda optimizer, p: optimizer.state[p]["mu"].view(1)[None].mul_(0.5),
    "mu =": set_item("mu", 0.125),
    "step.add_": lambda optimizer, p: optimizer.state[p]["step"].add_(7),
    "step by foreach": lambda optimizer, p: torch._foreach_add_([optimizer.state[p]["step"]], 7),
    "step =": set_item("step", 1.0),
    "eta.fill_": lambda optimizer, p: optimizer.state[p]["eta"].fill_(0.01),
    "eta =": set_item("eta", 0.02),
    "ax =": lambda optimizer, p: optimizer.state[p].__setitem__("ax", value_of(p)),
    "update": lambda optimizer, p: optimizer.state[p].update(ax=value_of(p), mu=torch.tensor(0.7)),
    "the whole entry": lambda optimizer, p: optimizer.state.__setitem__(
        p, {"step": torch.tensor(4.0), "eta": torch.tensor(0.03), "mu": torch.tensor(0.5), "ax": value_of(p)}
    ),
    "entry.clear": lambda optimizer, p: optimizer.state[p].clear(),
    "del": lambda optimizer, p: optimizer.state.__delitem__(p),
    "pop": lambda optimizer, p: optimizer.state.pop(p),
    "an empty entry": lambda optimizer, p: optimizer.state.__setitem__(p, {}),
    "clear": lambda optimizer, p: optimizer.state.clear(),
    "defaultdict": lambda optimizer, p: setattr(optimizer, "state", collections.defaultdict(dict)),
    "one entry for all": lambda optimizer, p: setattr(
        optimizer, "state", collections.defaultdict(dict, {p: {k: v.clone() for k, v in optimizer.state[p].items()}})
    ),
}


@pytest.mark.parametrize("world_size", [1, 2])
def test_writes_act_as_in_torch(world_size: int) -> None:
    """Before averaging starts and after: the next steps have the bits of torch.optim.ASGD with the same write."""

    def ranks(rank: int) -> None:
        for name, write in WRITES.items():
            for when in (T0 - 1, T0 + 3):
                pair = Pair(make_parameters(SPECS), lr=0.05, t0=T0, lambd=0.01, bucket_bytes=900)
                steps(pair, world_size, range(when))
                write(pair.optimizer, pair.params[PARAM])
                write(pair.oracle.optimizer, pair.oracle.params[PARAM])
                state = pair.oracle.optimizer.state[pair.oracle.params[PARAM]]
                for key in state if name not in ("one entry for all", "pop") else ():
                    found = pair.optimizer.state[pair.params[PARAM]][key]
                    if not isinstance(found, StatePiece):
                        assert torch.equal(found, state[key]), (name, when, key)
                steps(pair, world_size, range(when, when + 2))

    run_ranks(world_size, ranks)


def test_writes_in_place_to_ax_act_with_one_rank_and_are_refused_with_more() -> None:
    def ranks(rank: int, world_size: int) -> None:
        for when in (T0 - 1, T0 + 3):
            pair = Pair(make_parameters(SPECS), lr=0.05, t0=T0)
            steps(pair, world_size, range(when))
            if world_size == 1:
                pair.optimizer.state[pair.params[PARAM]]["ax"].zero_()
                assert not pair.optimizer.state[pair.params[PARAM]]["ax"].any()
                pair.oracle.optimizer.state[pair.oracle.params[PARAM]]["ax"].zero_()
            else:
                with pytest.raises(NotImplementedError, match="full_state_dict"):
                    pair.optimizer.state[pair.params[PARAM]]["ax"].zero_()
            steps(pair, world_size, range(when, when + 3))

    for world_size in (1, 2):
        run_ranks(world_size, ranks, world_size)


def test_what_has_no_meaning_is_refused_and_changes_nothing() -> None:
    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(SPECS), lr=0.05, t0=T0)
        steps(pair, 2, range(T0 + 3))
        optimizer, param = pair.optimizer, pair.params[PARAM]
        entry, stranger = optimizer.state[param], torch.zeros(3)
        refused: list[tuple[str, Callable[[], Any]]] = [
            ("keep values of your own beside the optimizer", lambda: entry.__setitem__("mine", 1)),
            ("no place for 'master'", lambda: entry.__setitem__("master", torch.zeros(33, 5))),
            (r"clear\(\)", lambda: entry.pop("ax")),
            (r"clear\(\)", lambda: entry.__delitem__("mu")),
            (r"clear\(\)", lambda: optimizer.state.popitem()),
            (r"of shape \(2,\)", lambda: entry.__setitem__("ax", torch.zeros(2))),
            ("float64", lambda: entry.__setitem__("ax", torch.zeros(33, 5, dtype=torch.float64))),
            ("out of range", lambda: entry["mu"].fill_(2.0)),
            ("out of range", lambda: entry.update(step=math.nan)),
            ("not a number", lambda: entry.__setitem__("eta", "small")),
            ("whole number", lambda: entry["step"].add_(0.5)),
            ("has no", lambda: optimizer.state.__setitem__(param, {"step": 1.0})),
            ("parameters only", lambda: optimizer.state.__setitem__(stranger, {})),
            ("parameters only", lambda: setattr(optimizer, "state", {stranger: {}})),
        ]
        for message, write in refused:
            with pytest.raises((ValueError, TypeError), match=message):
                write()
        assert list(entry) == ["step", "eta", "mu", "ax"] and "mine" not in entry
        with pytest.raises(KeyError):
            entry["mine"]
        optimizer.state = optimizer.state
        steps(pair, 2, range(T0 + 3, T0 + 6))

        fresh = ShardedASGD(named(make_parameters(SPECS)), lr=0.1)
        with pytest.raises(ValueError, match="lr"):  # eta of the first step is the lr
            fresh.state[fresh.param_groups[0]["params"][0]]["eta"] = 3.0

    run_ranks(2, ranks)


@pytest.mark.parametrize("layout", ["zero", "fsdp"])
def test_what_was_read_is_live_and_writing_it_back_changes_nothing(layout: str) -> None:
    """Frameworks move the state to a device by writing each of its tensors back."""

    def ranks(rank: int) -> None:
        options: dict[str, Any] = {"lr": 0.05, "t0": 2, "average": {"mean": Uniform(), "ema": EMA(0.9)}}
        (model, optimizer), (twin_model, twin) = (build(layout, **options) for _ in range(2))
        params = optimizer.param_groups[0]["params"]
        for number in range(6):
            for entry in optimizer.state.values():
                for key, value in entry.items():
                    entry[key] = value.to("cpu")
            held = dict(optimizer.state[params[3]])
            train(model, optimizer, layout, range(number, number + 1))
            train(twin_model, twin, layout, range(number, number + 1))
            for key, value in held.items() if number > 3 else ():
                assert torch.equal(local(value), local(optimizer.state[params[3]][key])), (key, number)
            assert float(held["step"]) == number + 1
        for one, other in zip(optimizer.state.values(), twin.state.values(), strict=True):
            assert all(torch.equal(local(one[key]), local(other[key])) for key in other)
        for one, other in zip(named_parameters(model).values(), named_parameters(twin_model).values(), strict=True):
            assert same_bits(local(one), local(other))

    run_ranks(2, ranks)


def test_reading_before_averaging_starts_takes_memory_until_the_next_step_only() -> None:
    """Also where a parameter is frozen, which no step goes over."""

    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(SPECS), lr=0.05, t0=100)
        pair.set_requires_grad(1, False)
        for number in range(4):
            assert all(float(entry["mu"]) == 1 and entry["ax"].numel() for entry in pair.optimizer.state.values())
            steps(pair, 2, range(number, number + 1))
        shards = [bucket.shard for bucket in pair.optimizer._all_buckets()]
        assert all(average is None for shard in shards for average in shard.averages.values())

    run_ranks(2, ranks)


def test_a_master_follows_its_parameter() -> None:
    def ranks(rank: int) -> None:
        (param,) = params = make_parameters([Spec((40, 3), torch.bfloat16)])
        optimizer = ShardedASGD(named(params), lr=0.1, t0=0)
        param.grad = torch.ones_like(param)
        optimizer.step()
        master = param.detach().float() * (1 + 2**-12)
        optimizer.state[param]["master"] = master  # rounds to the parameter
        with pytest.raises(ValueError, match="write the parameter"):
            optimizer.state[param]["master"] = master + 1
        full = optimizer.full_state_dict()
        assert not full or same_bits(full["state"][0]["master"], master)

    run_ranks(2, ranks)


def test_copies_of_the_state_are_plain_dicts() -> None:
    def ranks(rank: int) -> None:
        params = make_parameters(SPECS)
        optimizer = ShardedASGD(named(params), lr=0.1, t0=0)
        entry = optimizer.state[params[PARAM]]
        unpickled = pickle.loads(pickle.dumps(optimizer.state))
        assert type(unpickled) is dict and [list(state) for state in unpickled.values()] == [list(entry)] * len(params)
        for copied in (copy.deepcopy(entry), optimizer.state.pop(params[PARAM])):
            assert type(copied) is dict and type(copied["step"]) is torch.Tensor
            assert torch.equal(copied["ax"], params[PARAM]) and copied["ax"].data_ptr() != entry["ax"].data_ptr()
        mu = entry["mu"]
        assert mu.tolist() == 1 and mu.numpy() == 1 and type(mu + 1) is torch.Tensor and repr(mu) == "tensor(1.)"
        for share in (lambda: mu.numpy().fill(0), lambda: torch.from_dlpack(mu)):
            with pytest.raises((ValueError, BufferError)):
                share()

    run_ranks(1, ranks)


def test_other_writes_on_one_rank_are_refused_by_the_next_call(tmp_path: Path) -> None:
    def write_mu(optimizer: Any, p: torch.Tensor) -> None:
        optimizer.state[p]["mu"].mul_(0.3)

    def ranks(rank: int) -> None:
        params = make_parameters(SPECS)
        optimizer = ShardedASGD(named(params), lr=0.1, t0=0)
        sharded = optimizer.state_dict()
        writes = [write_mu, lambda optimizer, p: optimizer.state.pop(p), lambda optimizer, _: optimizer.state.clear()]
        for write in writes:
            optimizer.consolidate_state_dict()
            write(optimizer, params[PARAM])
            assert isinstance(optimizer.state_dict()["state"][0]["ax"], StatePiece), "state of before the write"
            optimizer.full_state_dict()  # every rank has written it
            if rank == 1:
                write(optimizer, params[PARAM])
            for refused in (
                optimizer.full_state_dict,
                lambda: save(str(tmp_path), {"optimizer": optimizer}),
                optimizer.step,
            ):
                with pytest.raises((RuntimeError, CheckpointError), match=r"optimizer\.state"):
                    refused()
            optimizer.load_state_dict(sharded)

    run_ranks(2, ranks)
