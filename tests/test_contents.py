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
from layouts import build, named_parameters, train, whole
from ranks import run_ranks

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


@pytest.mark.parametrize("stop", [0, 3, 8])
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
