"""Live state as the contents of a checkpoint and back: resumed runs have the bits of runs without a stop."""

import dataclasses
import json
import random
from collections.abc import Mapping
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from dist_asgd import ShardedASGD
from dist_asgd.checkpoint.format.entries import SavedTensor
from dist_asgd.checkpoint.format.json_values import Values, decode
from dist_asgd.checkpoint.state.contents import Contents, contents_of, destination_of
from dist_asgd.checkpoint.state.mismatches import Problems
from dist_asgd.checkpoint.state.rng import RandomState
from dist_asgd.checkpoint.state.sharing import Sharing
from tests.support.fsdp1 import build as fsdp1_build
from tests.support.fsdp1 import train as fsdp1_train
from tests.support.layouts import Model, batch, build, give_gradients, named_parameters, place, train, whole
from tests.support.ranks import run_alone, run_ranks

# One checkpoint in memory: whole tensors, and the values and paths of each rank.
Saved = tuple[dict[str, Tensor], list[dict[str, Any]], dict[str, Any]]


def save(state: Mapping[str, Any]) -> Saved:
    """Returns the contributions of all ranks, put together element by element. Fails if an element is missing."""
    everyone: list[Any] = [_copied(contents_of(state))]
    if dist.is_initialized():
        everyone = everyone * dist.get_world_size()
        dist.all_gather_object(everyone, everyone[0])
    tensors: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    for contents in everyone:
        for key, entry in contents.tensors.items():
            target = tensors.setdefault(key, torch.zeros(entry.shape, dtype=entry.dtype))
            covered = seen.setdefault(key, torch.zeros(entry.shape, dtype=torch.bool))
            for block in entry.blocks:
                where = tuple(slice(o, o + s) for o, s in zip(block.box.offsets, block.box.sizes, strict=True))
                target[where], covered[where] = block.data, True
    for key, covered in seen.items():
        assert covered.all(), f"no rank has all of {key}"
    values = [json.loads(json.dumps(contents.values, allow_nan=False)) for contents in everyone]
    return tensors, values, {key: path for contents in everyone for key, path in contents.paths.items()}


def _copied(contents: Contents) -> Contents:
    tensors = {
        key: type(entry)(
            entry.shape, entry.dtype, [type(block)(block.box, block.data.clone()) for block in entry.blocks]
        )
        for key, entry in contents.tensors.items()
    }
    return dataclasses.replace(contents, tensors=tensors)


def load(state: Mapping[str, Any], saved: Saved, rank: int = 0, **options: Any) -> None:
    tensors, values, paths = saved
    shapes = {key: SavedTensor(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    mine = Values(values[rank] if rank < len(values) else values[0], decode)
    destination = destination_of(state, shapes, mine, paths, **options)
    assert not destination.problems, destination.problems.message()
    for key, entries in destination.tensors.items():
        for entry in entries:
            assert entry.shape == tuple(tensors[key].shape)
            for block in entry.blocks:
                where = tuple(slice(o, o + s) for o, s in zip(block.box.offsets, block.box.sizes, strict=True))
                with torch.no_grad():
                    block.data.copy_(tensors[key][where])
    destination.finish()


OPTIONS: dict[str, Any] = {"lr": 0.05, "lambd": 1e-3, "t0": 5}


def of(model: nn.Module, optimizer: torch.optim.Optimizer, **more: Any) -> dict[str, Any]:
    return {"model": model, "optimizer": optimizer, **more}


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(param) for name, param in named_parameters(model).items()}


def check_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def saved_and_finished(layout: str, stop: int, end: int) -> Any:
    """Trains without a stop. Returns a checkpoint of step ``stop``, and the weights and the average of step ``end``."""

    def ranks(rank: int) -> Any:
        model, optimizer = build(layout, **OPTIONS)
        train(model, optimizer, layout, range(stop))
        saved = save(of(model, optimizer))
        train(model, optimizer, layout, range(stop, end))
        weights = bits(model)
        with optimizer.averaged_parameters():
            return saved, weights, bits(model)

    return ranks


def resumed(layout: str, saved: Saved, stop: int, end: int) -> Any:
    def ranks(rank: int) -> Any:
        model, optimizer = build(layout, seed=99, **{**OPTIONS, "lr": 9.0})
        load(of(model, optimizer), saved, rank)
        train(model, optimizer, layout, range(stop, end))
        weights = bits(model)
        with optimizer.averaged_parameters():
            return weights, bits(model)

    return ranks


def dense(cls: type[torch.optim.Optimizer] = torch.optim.ASGD, seed: int = 0, **options: Any) -> Any:
    model = Model(seed)
    return model, cls(model.parameters(), **(options or {**OPTIONS, "foreach": False}))


def integer_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Takes steps with gradients that are equal under every layout."""
    for step in steps:
        give_gradients(named_parameters(model), step)
        optimizer.step()
        optimizer.zero_grad()


def leg(layout: str, size: int, saved: Saved | None, steps: range) -> tuple[Saved, dict[str, Tensor]]:
    """Loads a checkpoint, takes some steps and saves another."""

    def ranks(rank: int) -> Any:
        model, optimizer = build(layout, seed=99, **OPTIONS)
        integer_steps(model, optimizer, range(2))  # what was there before does not matter
        load(of(model, optimizer), saved, rank)
        integer_steps(model, optimizer, steps)
        return save(of(model, optimizer)), bits(model)

    return run_ranks(size, ranks)[0]


def dense_leg(saved: Saved | None, steps: range) -> tuple[Saved, dict[str, Tensor]]:
    def alone() -> Any:
        model, optimizer = dense(seed=0 if saved is None else 98)
        if saved is not None:
            load(of(model, optimizer), saved)
        integer_steps(model, optimizer, steps)
        return save(of(model, optimizer)), bits(model)

    return run_alone(alone)


# (layout, ranks) of two legs between dense ones
JOURNEYS = [
    (("zero", 1), ("zero", 3)),
    (("zero", 3), ("hsdp", 4)),
    (("tp", 3), ("fsdp+tp", 4)),
    (("fsdp", 2), ("ddp", 2)),
]


@pytest.mark.parametrize("journey", JOURNEYS, ids=str)
def test_state_moves_between_layouts_and_torch_asgd(journey: Any) -> None:
    """Averaging begins at step 5, in the second leg."""
    ((first, first_size), (second, second_size)) = journey
    saved, _ = dense_leg(None, range(3))
    saved, _ = leg(first, first_size, saved, range(3, 7))
    saved, _ = leg(second, second_size, saved, range(7, 10))
    (tensors, values, _), weights = dense_leg(saved, range(10, 12))
    (whole_tensors, whole_values, _), expected = dense_leg(None, range(12))
    check_same(weights, expected)
    check_same(tensors, whole_tensors)
    assert values == whole_values


@pytest.mark.parametrize("stop", [0, 8])
def test_sharded_asgd_resumes_on_as_many_ranks(stop: int) -> None:
    saved, weights, average = run_ranks(3, saved_and_finished("zero", stop, 12))[0]
    for got_weights, got_average in run_ranks(3, resumed("zero", saved, stop, 12)):
        check_same(got_weights, weights)
        check_same(got_average, average)


def test_values_are_replaced_in_the_dict_that_was_given() -> None:
    nested = {"seed": 1}
    state = {"data": {"epoch": 3, "nested": nested, "any": {}}, "best": 0.5}
    saved = save({"data": {"epoch": 4, "nested": {"seed": 2}, "any": {"a.b": [1, {"c": None}]}}, "best": float("inf")})
    load(state, saved)
    assert state == {
        "data": {"epoch": 4, "nested": {"seed": 2}, "any": {"a.b": [1, {"c": None}]}},
        "best": float("inf"),
    }
    assert nested is state["data"]["nested"] and nested["seed"] == 2


OPTIMIZERS: dict[str, Any] = {
    "ASGD": lambda params: torch.optim.ASGD(params, **OPTIONS),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda params: torch.optim.Adam(params, lr=torch.tensor(0.01), amsgrad=True),
    "fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.01),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01, centered=True, momentum=0.5),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01),
    "Rprop": lambda params: torch.optim.Rprop(params),
    "Adafactor": lambda params: torch.optim.Adafactor(params),
    "LBFGS": lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=2),
}


def closure_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            x, y = batch(step)
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torch_optimizers_resume_in_fresh_ones(name: str) -> None:
    def alone() -> None:
        for stop in (0, 3):
            model = Model()
            frozen = model.inside.bias.requires_grad_(name == "LBFGS")
            optimizer = OPTIMIZERS[name](model.parameters())
            closure_steps(model, optimizer, range(stop))
            saved = save(of(model, optimizer))
            closure_steps(model, optimizer, range(stop, 6))
            again = Model(99)
            again.inside.bias.requires_grad_(frozen.requires_grad)
            loaded = OPTIMIZERS[name](again.parameters())
            load(of(again, loaded), saved)
            closure_steps(again, loaded, range(stop, 6))
            check_same(bits(again), bits(model))
            same_state(loaded.state_dict(), optimizer.state_dict())

    run_alone(alone)


def same_state(ours: Any, theirs: Any) -> None:
    """Fails unless two states are equal and of equal types."""
    assert type(ours) is type(theirs), (ours, theirs)
    if isinstance(ours, Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            same_state(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            same_state(one, other)
    else:
        assert ours == theirs


def test_fresh_optimizers_of_fsdp2_resume_on_other_ranks() -> None:
    """DCP itself leaves a fresh optimizer as it is, without a word."""

    def first(rank: int) -> Any:
        model = place("fsdp", Model())
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        integer_steps(model, optimizer, range(3))
        return save(of(model, optimizer))

    def second(rank: int) -> dict[str, Tensor]:
        model = place("fsdp", Model(99))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
        load(of(model, optimizer), saved, rank)
        integer_steps(model, optimizer, range(3, 6))
        return bits(model)

    saved = run_ranks(3, first)[0]
    model, optimizer = dense(torch.optim.Adam, lr=0.01)
    integer_steps(model, optimizer, range(6))
    for weights in run_ranks(2, second):
        check_same(weights, bits(model))


# Modules


class Tied(nn.Module):
    """Tied weights, buffers of both kinds, normalisation and extra state."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(7, 7)
        self.norm = nn.BatchNorm1d(7)
        self.second = nn.Linear(7, 7)
        self.second.weight = self.first.weight
        self.out = nn.Linear(7, 1)
        self.register_buffer("kept", torch.full((2,), float(seed)))
        self.register_buffer("dropped", torch.full((2,), float(seed)), persistent=False)
        self.extra: Any = {"seen": {seed: "x"}, "table": torch.full((3,), float(seed))}

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(torch.tanh(self.norm(self.first(x)))))

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


WRAPPED = {
    "plain": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "ddp": nn.parallel.DistributedDataParallel,
    "ddp of compiled": lambda model: nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager")),
}


def test_modules_in_any_wrapper_have_the_same_entries_and_resume() -> None:
    def ranks(rank: int) -> None:
        model = Tied()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        closure_steps(model, optimizer, range(3))
        checkpoints = [save(of(wrap(model), optimizer)) for wrap in WRAPPED.values()]
        for tensors, values, paths in checkpoints:
            check_same(tensors, checkpoints[0][0])
            assert values == checkpoints[0][1] and paths == checkpoints[0][2]
        assert {"model.second.weight", "model.norm.running_var", "model.kept", "model._extra_state.table"} <= {*tensors}
        assert "model.dropped" not in tensors and "optimizer.state.second.weight.momentum_buffer" not in tensors
        closure_steps(model, optimizer, range(3, 6))
        for wrap in WRAPPED.values():
            other = Tied(5)
            wrapped = wrap(other)
            loaded = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
            load(of(wrapped, loaded), checkpoints[0])
            assert other.extra["seen"] == {0: "x"} and torch.equal(other.extra["table"], torch.zeros(3))
            assert other.second.weight is other.first.weight
            closure_steps(wrapped, loaded, range(3, 6))
            check_same(dict(other.named_buffers()), {**dict(model.named_buffers()), "dropped": torch.full((2,), 5.0)})
            check_same(bits(other), bits(model))

    run_ranks(1, ranks)


@pytest.mark.parametrize("kind", ["sharded", "asgd", "flat"])
def test_fsdp1(kind: str) -> None:
    """Parameters that are slices, and flat ones; on 3 ranks some have nothing of most."""

    def make(seed: int) -> Any:
        if kind == "sharded":
            return fsdp1_build(seed=seed)
        options = {"use_orig_params": kind == "asgd", "device_id": torch.device("cpu")}
        model = FullyShardedDataParallel(Model(seed), **options)
        return model, torch.optim.ASGD(model.parameters(), foreach=False, **OPTIONS)

    def ranks(rank: int) -> Any:
        for stop in (0, 7):
            model, optimizer = make(0)
            fsdp1_train(model, optimizer, range(stop))
            saved = save(of(model, optimizer))
            fsdp1_train(model, optimizer, range(stop, 9))
            again, loaded = make(99)
            load(of(again, loaded), saved, rank)
            fsdp1_train(again, loaded, range(stop, 9))
            contexts = [FullyShardedDataParallel.summon_full_params(each) for each in (model, again)]
            with contexts[0], contexts[1]:
                check_same(dict(again.named_parameters()), dict(model.named_parameters()))
        return saved

    saved = run_ranks(3, ranks)[0]
    model, optimizer = dense(seed=9)
    load(of(model, optimizer), saved)
    expected = {key: value for key, value in saved[0].items() if key.startswith("optimizer")}
    check_same({key: value for key, value in save(of(model, optimizer))[0].items() if key in expected}, expected)


def test_keys_are_those_of_torch_distributed_checkpoint() -> None:
    def ranks(rank: int) -> None:
        for layout in ("zero", "fsdp"):
            model, optimizer = build(layout, **OPTIONS)
            train(model, optimizer, layout, range(2))
            contents = contents_of(of(model, optimizer))
            states = get_state_dict(model, optimizer)
            _, mapping = flatten_state_dict({"model": states[0], "optimizer": states[1]})
            assert contents.paths == mapping
            assert contents.tensors.keys() | contents.values.keys() == mapping.keys()
            assert set(contents.sharing.values()) == {Sharing.EQUAL}

    run_ranks(2, ranks)


def test_no_tensor_is_copied() -> None:
    model, optimizer = dense(torch.optim.Adam, lr=0.1)
    closure_steps(model, optimizer, range(1))
    table = torch.zeros(3, requires_grad=True)
    entries = contents_of({"m": model, "o": optimizer, "t": [table]}).tensors
    state = optimizer.state[model.inside.weight]
    expected = {
        "m.inside.weight": model.inside.weight,
        "o.state.inside.weight.exp_avg": state["exp_avg"],
        "t.0": table,
    }
    for key, tensor in expected.items():
        (block,) = entries[key].blocks
        assert block.data.data_ptr() == tensor.data_ptr() and not block.data.requires_grad


# Schedulers and others with a state

SCHEDULERS: dict[str, Any] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 4, 5], 0.5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 5)], [3]
    ),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, 3),
    "SWALR": lambda o: SWALR(o, 0.01, anneal_epochs=4),
}


def scheduled(optimizer: torch.optim.Optimizer, scheduler: Any, steps: range) -> list[float]:
    rates = []
    for step in steps:
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step(*([[1.0, 0.9, 1.1, 1.2, 1.3, 0.5][step]] if "Plateau" in type(scheduler).__name__ else []))
    return rates


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_resume(name: str) -> None:
    def make() -> Any:
        optimizer = torch.optim.SGD(nn.Linear(2, 2).named_parameters(), lr=0.1, momentum=0.5)
        return optimizer, SCHEDULERS[name](optimizer)

    for stop in (0, 3):
        optimizer, scheduler = make()
        scheduled(optimizer, scheduler, range(stop))
        saved = save({"optimizer": optimizer, "scheduler": scheduler})
        rates = scheduled(optimizer, scheduler, range(stop, 6))
        again, loaded = make()
        load({"optimizer": again, "scheduler": loaded}, saved)
        assert scheduled(again, loaded, range(stop, 6)) == rates
        same_state(loaded.state_dict(), scheduler.state_dict())


class Loader:
    """A data loader like torchdata's, whose state is made of nested values and tensors and differs between ranks."""

    def __init__(self, rank: int) -> None:
        workers = {f"worker_{n}": {"position": rank + n, "file": f"a.b/{n}.txt"} for n in range(2)}
        self.state: dict[str, Any] = {"workers": workers, "epoch": None, "empty": {}, "none": [], "pair": (1, [2])}
        self.state |= {"shuffle": torch.arange(4) + rank, "by_number": {3: torch.ones(2), 1: [torch.zeros(1), "x"]}}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state


def test_objects_with_a_state_get_it_back_as_it_was() -> None:
    loader = Loader(3)
    saved = save({"deep": [{"loader": loader}]})
    sharing = contents_of({"a": loader}).sharing
    assert sharing["a.shuffle"] is sharing["a.epoch"] is Sharing.VARYING
    fresh, other = Loader(5), Loader(6)
    other.state = {}
    for target in (fresh, other):
        load({"deep": [{"loader": target}]}, saved)
        same_state(target.loaded, loader.state)


@pytest.mark.parametrize("enabled", [True, False])
def test_gradscaler_resumes(enabled: bool) -> None:
    scaler, again = (torch.amp.GradScaler("cpu", scale, enabled=enabled) for scale in (1024.0, 2.0))
    load({"scaler": again}, save({"scaler": scaler}))
    assert again.state_dict() == scaler.state_dict() and again.get_scale() == scaler.get_scale()


def test_random_numbers_go_on(caplog: pytest.LogCaptureFixture) -> None:
    def draw() -> Any:
        return random.random(), numpy.random.rand(), torch.rand(2).tolist(), random.gauss(0, 1)

    before = draw()
    saved = save({"rng": RandomState()})
    expected = draw()
    assert expected != before
    load({"rng": RandomState()}, saved)
    assert draw() == expected
    load({"rng": RandomState()}, (saved[0], [{}], saved[2]))
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "'rng'" in caplog.text


# What does not fit


def test_all_that_does_not_fit_is_in_one_message() -> None:
    model, other = nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    saved = save({"model": other[0], "table": torch.zeros(2), "data": {"epoch": 1, "old": 2}, "other": 5})
    tensors, values, paths = saved
    state = {"model": model, "table": torch.zeros(2, dtype=torch.int64), "data": {"epoch": 0, "new": 3}, "list": [1]}
    before = bits(model)
    shapes = {key: SavedTensor(tuple(value.shape), value.dtype) for key, value in tensors.items()}
    problems = destination_of(state, shapes, values[0], paths).problems
    assert problems.message().splitlines() == [
        "missing from the checkpoint (2):",
        "  data.new: expected a value like the int there",
        "  list: expected a value like the list there",
        "of another shape (2):",
        "  model.bias: found float32 [4], expected float32 [2]",
        "  model.weight: found float32 [4, 3], expected float32 [2, 3]",
        "of another dtype or kind (1):",
        "  table: found float32 [2], expected int64 [2]",
    ]
    lenient = destination_of(state, shapes, values[0], paths, strict=False).problems
    assert not lenient.missing and not lenient.unexpected and not lenient.wrong_shape
    assert lenient.wrong_dtype == problems.wrong_dtype
    assert state["data"] == {"epoch": 0, "new": 3}
    check_same(bits(model), before)


def test_optimizers_that_do_not_fit() -> None:
    def problems_of(state: Mapping[str, Any], **options: Any) -> Problems:
        shapes = {key: SavedTensor(tuple(value.shape), value.dtype) for key, value in saved[0].items()}
        return destination_of(state, shapes, saved[1][0], saved[2], **options).problems

    model, optimizer = dense(torch.optim.Adam, lr=0.1)
    closure_steps(model, optimizer, range(1))
    saved = save(of(model, optimizer))
    assert not problems_of({"optimizer": torch.optim.Adam(model.named_parameters())})
    sgd = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    assert {*problems_of({"optimizer": sgd}).missing} == {
        f"optimizer.param_groups.0.{name}" for name in ("momentum", "dampening")
    }
    some = [("inside.weight", model.inside.weight), ("new", nn.Parameter(torch.zeros(2)))]
    found = problems_of({"optimizer": torch.optim.Adam(some)})
    assert "optimizer.param_groups.0.params: new" in found.missing
    assert "optimizer.param_groups.0.params: inside.bias" in found.unexpected
    assert "optimizer.state.inside.bias.exp_avg" in found.unexpected
    assert not problems_of({"optimizer": torch.optim.Adam(some)}, strict=False)
    with pytest.raises(ValueError, match="put the module into the state as well"):
        contents_of({"optimizer": optimizer})


def test_problems_of_ranks_are_merged_and_long_lists_cut() -> None:
    one = Problems(missing={f"key{n:03}": "expected a value" for n in range(60)})
    both = one.merge(Problems(missing={"key000": "other", "zzz": "more"}, wrong_dtype={"x": "found it"}))
    lines = both.message().splitlines()
    assert lines[0] == "missing from the checkpoint (61):" and lines[1] == "  key000: expected a value"
    assert len(lines) == 1 + 50 + 1 + 2 and lines[51] == "  ... and 11 more"
    assert both and not Problems()


# Parts of a checkpoint


@pytest.mark.parametrize("layout", ["zero", "fsdp"])
def test_averages_are_loaded_into_the_model(layout: str) -> None:
    def ranks(rank: int) -> Any:
        model, optimizer = build(layout, **OPTIONS)
        train(model, optimizer, layout, range(9))
        with optimizer.averaged_parameters():
            expected = bits(model)
        saved = save(of(model, optimizer))
        load({"model": model}, saved, average=True)
        check_same(bits(model), expected)
        return saved, expected

    saved, expected = run_ranks(2, ranks)[0]
    model = Model(99)
    load({"model": model}, saved, average=True)
    check_same(bits(model), expected)
    load({"model": model}, saved)
    assert torch.equal(model.inside.weight, saved[0]["model.inside.weight"])


def test_one_of_several_averages_is_loaded_by_its_name() -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    names = dict(model.named_parameters())
    state = {name: {"ax": p.detach() + 1, "ax_ema": p.detach() + 2} for name, p in names.items()}
    for text, first in (("mean=Uniform(every=1), ema=EMA(every=1, decay=0.9)", "mean"), ("EMA(every=2)", "average")):
        groups = [{"params": list(names), "average": text}]
        saved = save({"model": model, "teacher": other, "optimizer": {"state": state, "param_groups": groups}})
        for average, more in ((True, 1), (first, 1), ("ema", 2)):
            targets = {"model": nn.Linear(3, 2), "teacher": nn.Linear(3, 2)}
            load(targets, saved, average=average)
            check_same(bits(targets["model"]), {name: p.detach() + more for name, p in names.items()})
        with pytest.raises(ValueError, match=f"no average 'other', it has .'{first}', 'ema'."):
            load(targets, saved, average="other")
    with pytest.raises(ValueError, match="no averages"):  # and not the weights as they are, without a word
        load({"model": model}, save({"model": model}), average=True)


def test_averages_wider_than_tied_parameters_are_rounded_once() -> None:
    model = Tied().to(torch.bfloat16)
    optimizer = ShardedASGD(model.named_parameters(), **OPTIONS)
    for step in range(9):
        give_gradients(dict(model.named_parameters()), step)
        optimizer.step()
    saved = save(of(model, optimizer))
    other = Tied(5).to(torch.bfloat16)
    load({"model": other}, saved, average=True)
    for name, param in other.named_parameters():
        average = saved[0][f"optimizer.state.{name}.ax"]
        assert average.dtype == torch.float32 and torch.equal(param, average.to(torch.bfloat16))
    assert other.second.weight is other.first.weight and torch.equal(other.kept, torch.zeros(2, dtype=torch.bfloat16))


def test_an_empty_state_takes_the_whole_checkpoint() -> None:
    model, optimizer = dense(torch.optim.Adam, lr=0.1)
    closure_steps(model, optimizer, range(1))
    everything: dict[str, Any] = {}
    load(everything, save(of(model, optimizer, data={"a": [1, {2: torch.ones(1)}]})))
    assert everything.keys() == {"model", "optimizer", "data"}
    check_same(everything["model"], dict(model.state_dict()))
    same_state(everything["data"], {"a": [1, {2: torch.ones(1)}]})
    assert everything["optimizer"]["param_groups"][0]["params"] == [name for name, _ in model.named_parameters()]


def test_optimizers_of_several_modules_and_modules_of_several_optimizers() -> None:
    def make(seed: int) -> dict[str, Any]:
        g, d = Model(seed), Model(seed + 1)
        both = torch.optim.Adam([*g.blocks.parameters(), *d.blocks.parameters()], lr=0.1)
        return {"nets": {"g": g, "d": d}, "optimizers": [torch.optim.SGD(g.outside.parameters(), 0.1, 0.9), both]}

    def steps(state: dict[str, Any], numbers: range) -> None:
        for step in numbers:
            for net in state["nets"].values():
                give_gradients(dict(net.named_parameters()), step)
            for optimizer in state["optimizers"]:
                optimizer.step()

    state, again = make(0), make(7)
    steps(state, range(2))
    saved = save(state)
    assert "optimizers.0.state.outside.weight.momentum_buffer" in saved[0]
    assert "optimizers.1.state.nets.d.blocks.0.up.weight.exp_avg" in saved[0]
    load(again, saved)
    steps(state, range(2, 4))
    steps(again, range(2, 4))
    for name in ("g", "d"):
        check_same(bits(again["nets"][name]), bits(state["nets"][name]))
