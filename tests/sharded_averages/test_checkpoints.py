"""Averages in checkpoints: any layout in, any out; plain `dcp.load` reads one as a model; loads by name."""

import contextlib
import io
import json

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from dist_asgd import Checkpointer, export, load
from dist_asgd.cli.main import main
from tests.support.beside import KINDS, build, trained
from tests.support.layouts import Model, named_parameters, whole
from tests.support.ranks import run_alone, run_ranks

ROUTES = [("zero", 2, "fsdp", 3), ("fsdp", 3, "ddp", 2), ("hsdp", 4, "tp", 2), ("ddp", 2, "zero", 1)]


def save(rank, layout, folder):
    model, optimizer, averages, _ = trained(layout)
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(5, {"model": model, "averages": averages, "optimizer": optimizer})
    for name in KINDS:
        with averages.averaged_parameters(name):
            export(folder / f"live-{name}.safetensors", model)
    return {name: averages.full_state_dict(name) for name in KINDS}


def resume(rank, layout, folder, expected):
    model, _optimizer, averages = build(layout)
    with Checkpointer(folder) as checkpoints:
        assert checkpoints.load({"model": model, "averages": averages}, strict=False) == 5
    assert averages.updates == 5
    for name in KINDS:
        found = averages.full_state_dict(name)
        assert all(torch.equal(found[key], expected[name][key]) for key in found)
    again, *_ = build(layout)
    load(f"{folder}/{next(iter_steps(folder))}", {"model": again}, average="mean")
    for key, param in named_parameters(again).items():
        assert torch.equal(whole(param), expected["mean"][key])


def iter_steps(folder):
    return (path.name for path in folder.iterdir() if path.name.startswith("step-"))


@pytest.mark.parametrize(("layout", "ranks", "other", "others"), ROUTES)
def test_any_layout_in_and_any_out(tmp_path, layout, ranks, other, others):
    expected = run_ranks(ranks, save, layout, tmp_path)[0]
    run_ranks(others, resume, other, tmp_path, expected)
    run_alone(read_as_a_model, tmp_path, expected)


def read_as_a_model(folder, expected):
    """Neither names nor values need this library."""
    state = {"averages": {name: Model(1).state_dict() for name in KINDS}}
    dcp.load(state, checkpoint_id=folder / next(iter_steps(folder)), no_dist=True)
    for name in KINDS:
        assert all(torch.equal(state["averages"][name][key], expected[name][key]) for key in expected[name])
        export_and_show(folder, name, expected[name])


def export_and_show(folder, name, expected):
    out = folder / f"{name}.safetensors"
    command("export", folder, out, "--average", name)
    for exported in map(safetensors.torch.load_file, (out, folder / f"live-{name}.safetensors")):
        assert exported.keys() == expected.keys()
        assert all(torch.equal(exported[key], expected[key]) for key in expected)
    shown = command("show", folder, "--average", name)
    assert shown["averages"][:2] == list(KINDS) and not shown["values"]
    assert {key: tensor["shape"] for key, tensor in shown["tensors"].items()} == {
        f"averages.{name}.{key}": list(tensor.shape) for key, tensor in expected.items()
    }


def command(*arguments):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(out.getvalue())
