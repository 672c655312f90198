"""Live state as the contents of a checkpoint and back: resumed runs have the bits of runs without a stop."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_asgd.checkpoint.contents import Contents, contents_of, destination_of
from dist_asgd.checkpoint.entries import SavedTensor
from layouts import Model, batch, build, give_gradients, named_parameters, place, train, whole
from ranks import run_alone, run_ranks

# One checkpoint in memory: whole tensors, and the values and paths of each rank.
Saved = tuple[dict[str, Tensor], list[dict[str, Any]], dict[str, Any]]


def save(state: Mapping[str, Any]) -> Saved:
    """What all ranks bring, put together element by element; each element must be there."""
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
    return Contents(tensors, contents.values, contents.paths, contents.varying)


def load(state: Mapping[str, Any], saved: Saved, rank: int = 0, **options: Any) -> None:
    tensors, values, paths = saved
    shapes = {key: SavedTensor(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    destination = destination_of(state, shapes, values[rank] if rank < len(values) else values[0], paths, **options)
    assert not destination.problems, destination.problems.message()
    for key, entries in destination.tensors.items():
        for entry in entries:
            assert (entry.shape, entry.dtype) == (tuple(tensors[key].shape), tensors[key].dtype)
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
    """A checkpoint at a step, and the weights and the average at the end without a stop."""

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
    """Steps with the same gradients under every layout."""
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
    """Through averaging's beginning at step 5."""
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
    """Equal, with the same types."""
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
    """DCP itself would leave them as they are, without a word."""

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
