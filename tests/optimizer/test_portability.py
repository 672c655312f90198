"""State saved under any layout goes on under any other, by stock PyTorch, with the bits of a run without a stop."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from dist_asgd import ShardedASGD
from dist_asgd.pieces import rank_local
from tests.support import dtensors
from tests.support.layouts import EVERYWHERE, WORLD_SIZES, build, local, named_parameters
from tests.support.oracle import same_bits
from tests.support.portability import LAST, OPTIONS, SAVED, check, reference, train
from tests.support.ranks import run_ranks


def state_of(model: nn.Module, optimizer: ShardedASGD, **options: Any) -> dict[str, Any]:
    wanted = StateDictOptions(**options)
    return {
        "model": get_model_state_dict(model, options=wanted),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=wanted),
    }


def saved_as(folder: str, layout: str, world_size: int) -> str:
    return f"{folder}/{layout}-{world_size}"


def save(rank: int, folder: str, layout: str, world_size: int, steps: int, options: dict[str, Any]) -> None:
    model, optimizer = build(layout, **OPTIONS)
    train(model, optimizer, range(steps))
    dcp.save(state_of(model, optimizer, **options), checkpoint_id=saved_as(folder, layout, world_size))


def load(rank: int, folder: str, layout: str, sources: list[tuple[str, int]], options: dict[str, Any]) -> None:
    at_save, at_end = reference(SAVED), reference(LAST)
    model, optimizer = build(layout, seed=99, **OPTIONS)
    for source in sources:
        train(model, optimizer, range(50, 52))  # so that there is something else to be loaded over
        state = state_of(model, optimizer, **options)
        dcp.load(state, checkpoint_id=saved_as(folder, *source))
        wanted = StateDictOptions(**options)
        set_model_state_dict(model, state["model"], options=wanted)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=wanted)
        check(model, optimizer, at_save, ("loaded", source))
        if source == sources[-1]:
            train(model, optimizer, range(SAVED, LAST))
            check(model, optimizer, at_end, ("trained on", source))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a checkpoint of every layout on every number of ranks."""
    folder = str(tmp_path_factory.mktemp("saved"))
    for layout, world_size in EVERYWHERE:
        run_ranks(world_size, save, folder, layout, world_size, SAVED, {})
    return folder


@pytest.mark.parametrize("target", range(len(EVERYWHERE)))
def test_any_layout_goes_on_from_any_other(saved: str, target: int) -> None:
    """From half of the layouts, the next target from the others: each layout's targets together from all of them."""
    layout, world_size = EVERYWHERE[target]
    sources = [(source, sizes[(target + 1) % len(sizes)]) for source, sizes in WORLD_SIZES.items()][target % 2 :: 2]
    run_ranks(world_size, load, saved, layout, sources, {}, timeout=120)


@pytest.mark.parametrize("way", ["flatten_optimizer_state_dict", "cpu_offload"])
def test_other_forms_of_the_state_dict(tmp_path: Path, way: str) -> None:
    options = {way: True}
    sources = [("fsdp", 2), ("hsdp", 4), ("fsdp+tp", 4), ("zero", 3)]
    for layout, world_size in sources:
        run_ranks(world_size, save, str(tmp_path), layout, world_size, SAVED, options)
    for layout in ("zero", "fsdp", "hsdp", "tp"):
        run_ranks(2, load, str(tmp_path), layout, sources, options, timeout=120)


@pytest.mark.parametrize("layout", WORLD_SIZES)
def test_copies_of_the_state_dict_do_not_change_with_the_optimizer(tmp_path: Path, layout: str) -> None:
    """deepcopy, torch.save, and dcp.async_save, which copies as well; nor does the state dict itself."""

    def ranks(rank: int) -> None:
        model, optimizer = build(layout, **OPTIONS)
        train(model, optimizer, range(SAVED))
        held, copied = optimizer.state_dict(), copy.deepcopy(optimizer.state_dict())
        torch.save(rank_local(optimizer.state_dict()), tmp_path / f"{rank}.pt")
        saved = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        background = dist.new_group(backend="gloo")
        state = state_of(model, optimizer)
        future = dcp.async_save(state, checkpoint_id=saved_as(str(tmp_path), layout, 2), process_group=background)
        train(model, optimizer, range(SAVED, LAST))
        future.result()
        check(model, optimizer, reference(LAST), "trained while it was saved")
        now = optimizer.state_dict()["state"]
        for index, entry in copied["state"].items():
            before, after = local(entry["ax"]), local(now[index]["ax"])
            assert same_bits(before, local(saved["state"][index]["ax"])), index
            assert not before.numel() or not same_bits(before, after), index
            assert same_bits(before, local(held["state"][index]["ax"])), index
        load(rank, str(tmp_path), layout, [(layout, 2)], {})

    run_ranks(2, ranks)


@pytest.mark.parametrize("layout", WORLD_SIZES)
def test_stock_pytorch_reads_it_without_this_library(tmp_path: Path, layout: str) -> None:
    """Into dense tensors of one process."""
    run_ranks(2, save, str(tmp_path), layout, 2, SAVED, {})
    oracle, optimizer = reference(SAVED)
    names = {param: name for name, param in oracle.named_parameters()}
    state = {names[p]: {"ax": torch.full_like(p, 7), "step": torch.tensor(0.0)} for p in names}
    dcp.load({"optimizer": {"state": state}}, checkpoint_id=saved_as(str(tmp_path), layout, 2), no_dist=True)
    for param, name in names.items():
        assert same_bits(state[name]["ax"], optimizer.state[param]["ax"]), name
        assert state[name]["step"] == SAVED


@pytest.mark.parametrize("layout", ["fsdp", "tp"])
def test_state_of_torch_asgd_on_the_same_dtensors_loads(layout: str) -> None:
    def ranks(rank: int) -> None:
        model, _ = build(layout, **OPTIONS)
        theirs = torch.optim.ASGD(model.parameters(), foreach=False, **OPTIONS)
        train(model, theirs, range(SAVED))
        ours_model, ours = build(layout, seed=99, **OPTIONS)
        set_model_state_dict(ours_model, get_model_state_dict(model))
        if layout == "tp":  # the plain parameters' state is whole, that of DTensors too
            ours.load_state_dict(theirs.state_dict())
        else:
            set_optimizer_state_dict(ours_model, ours, get_optimizer_state_dict(model, theirs))
        check(ours_model, ours, reference(SAVED), layout)
        train(ours_model, ours, range(SAVED, LAST))
        check(ours_model, ours, reference(LAST), layout)

    run_ranks(2, ranks)


def test_dense_state_loads_under_every_layout() -> None:
    def ranks(rank: int) -> None:
        oracle, optimizer = reference(SAVED)
        for layout in WORLD_SIZES:
            model, ours = build(layout, **OPTIONS)
            train(model, ours, range(3))
            with torch.no_grad():
                for name, param in named_parameters(model).items():
                    give = dict(oracle.named_parameters())[name]
                    if isinstance(param, DTensor):
                        give = dtensors.distribute(give.detach(), param)
                    param.copy_(give)
            ours.load_state_dict(optimizer.state_dict())
            check(model, ours, reference(SAVED), layout)

    run_ranks(4, ranks)
