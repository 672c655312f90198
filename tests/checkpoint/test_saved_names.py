"""Names that wrappers or another module have added to a checkpoint's entries are matched with those of live modules."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from dist_asgd import ShardedASGD, load, save
from dist_asgd.checkpoint import CheckpointError
from dist_asgd.checkpoint.state.saved_names import renamed, without_wrappers
from dist_asgd.cli.main import main
from tests.support.ranks import message_of, run_ranks

WRAPPERS = {
    "bare": lambda model: model,
    "ddp": nn.parallel.DistributedDataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "ddp of compiled": lambda model: nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager")),
    "compiled part": lambda model: nn.Sequential(torch.compile(model[0], backend="eager"), model[1]),
}


class Noted(nn.Linear):
    note = 0

    def get_extra_state(self):
        return self.note

    def set_extra_state(self, state):
        self.note = state


def built(value):
    """A model with parameters, buffers and extra state that tell ``value``."""
    model = nn.Sequential(Noted(2, 3), nn.BatchNorm1d(3))
    model[0].note = value
    with torch.no_grad():
        for number, tensor in enumerate([*model.parameters(), *model.buffers()]):
            tensor.fill_(value + number)
    return model


def contents(model):
    return {name: tensor.tolist() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def wrapped_and_back(rank, folder):
    expected = contents(built(5))
    for saved_as, wrap in WRAPPERS.items():
        saved = {"model": wrap(built(5)).state_dict()}
        save(folder / saved_as, saved)
        dcp.save(saved, checkpoint_id=folder / f"stock {saved_as}")
        for url in (folder / saved_as, folder / f"stock {saved_as}"):
            for loaded_into in ("bare", "ddp of compiled"):
                model = built(0)
                load(url, {"model": WRAPPERS[loaded_into](model)})
                assert contents(model) == expected and model[0].note == 5, (url, loaded_into)


def test_wrappers_at_the_save_and_at_the_load_may_differ(tmp_path):
    run_ranks(1, wrapped_and_back, tmp_path)


class Whole(nn.Module):
    """A module with a model in it, like one of Lightning."""

    def __init__(self, model):
        super().__init__()
        self.model = model


def part(rank, folder):
    def trained(value, steps):
        torch.manual_seed(value)
        model = nn.Linear(3, 2)
        whole = Whole(model)
        optimizer = ShardedASGD(whole.named_parameters(), lr=0.1, t0=1)
        for _ in range(steps):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, whole, optimizer

    model, whole, optimizer = trained(1, 4)
    save(folder / "own", {"model": whole, "optimizer": optimizer})
    state = {"model": whole.state_dict()}
    dcp.save({**state, "optimizer": get_optimizer_state_dict(whole, optimizer)}, checkpoint_id=folder / "names")
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    dcp.save(
        {**state, "optimizer": get_optimizer_state_dict(whole, optimizer, options=flat)}, checkpoint_id=folder / "flat"
    )
    save(folder / "bare", {"model": model, "optimizer": optimizer})
    full = optimizer.full_state_dict()
    for name in ("own", "names", "flat", "bare"):
        for prefix in ("model.", "model"):
            live, _, other = trained(2, 0)
            load(folder / name, {"model": live, "optimizer": other}, prefix=prefix)
            assert torch.equal(live.weight, model.weight)
            found = other.full_state_dict()["state"]
            assert found[0]["step"] == 4 and torch.equal(found[0]["ax"], full["state"][0]["ax"]), name
        if name != "flat":
            load(folder / name, {"model": live}, prefix="model", average=True)
            assert torch.equal(live.weight, full["state"][0]["ax"])
    message = message_of(lambda: load(folder / "own", {"model": live}), CheckpointError)
    assert (
        "model.weight: expected" in message and "model.model.weight: float32 [2, 3], nothing here takes it" in message
    )


def test_a_given_prefix_is_left_out_of_names(tmp_path):
    run_ranks(1, part, tmp_path)


def test_two_names_that_become_one_are_refused(tmp_path):
    save(tmp_path / "c", {"model": {"module.weight": torch.ones(1, 2), "_orig_mod.weight": torch.zeros(1, 2)}})
    live = nn.Linear(2, 1, bias=False)
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=r"'_orig_mod.weight' and 'module.weight' both become 'weight'"):
            load(tmp_path / "c", {"model": live}, strict=strict)


def test_names_that_are_live_ones_stay(tmp_path):
    save(tmp_path, {"model": nn.Linear(1, 1)})
    assert renamed(["w", "module.w"], ["w"]) == {"w": "w", "module.w": "module.w"}
    assert renamed(["w", "module.w"], ["w", "module.w"]) == {"w": "w", "module.w": "module.w"}
    assert renamed(["a.module.w"], ["a.w"]) == {"a.module.w": "a.w"}
    assert renamed(["w"], ["module.w"]) == {"w": "module.w"}
    assert renamed(["model.w", "loss"], ["w"], "model.") == {"model.w": "w", "loss": "loss"}
    with pytest.raises(CheckpointError, match=r"'model\.w' and 'w' both become 'w'"):
        renamed(["model.w", "w"], ["w"], "model.")
    with pytest.raises(TypeError, match="prefix must be a string"):
        load(tmp_path, {"model": nn.Linear(1, 1)}, prefix=None)


def test_exports_have_no_names_of_wrappers(tmp_path):
    state = {"module.a._orig_mod.w": torch.ones(1), "module.b": torch.zeros(1)}
    save(tmp_path / "c", {"model": state})
    assert main(["export", str(tmp_path / "c"), str(tmp_path / "out.pt")]) == 0
    assert torch.load(tmp_path / "out.pt").keys() == {"a.w", "b"}
    assert without_wrappers(["module.w", "x"]) == {"module.w": "module.w", "x": "x"}
    with pytest.raises(CheckpointError, match="both become 'w'"):
        without_wrappers(["w", "_orig_mod.w"])
