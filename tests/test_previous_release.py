"""State dicts and checkpoints of the 0.1 release load.

The files in tests/data/0.1 were made at commit 239652c on two gloo ranks by::

    torch.manual_seed(0)
    model = Sequential(Linear(5, 7), Tanh(), Linear(7, 3))
    opt = ShardedASGD(model.named_parameters(), lr=0.1, t0=2, average={"mean": Uniform(), "ema": EMA(0.5)})
    sched = StepLR(opt, 3)
    for s in range(6):
        torch.manual_seed(s)
        model(torch.randn(4, 5)).square().mean().backward(); opt.step(); opt.zero_grad(); sched.step()
    Checkpointer("run").save(6, {"model": model, "optimizer": opt, "scheduler": sched, "data": {"epoch": 1}})
    torch.save(opt.state_dict(), f"state_dict.rank{rank}.pt")

expected.pt has plain tensors: the parameters ("model"), ``opt.full_state_dict()`` ("full"), and the parameters inside
``opt.averaged_parameters(name)`` ("mean", "ema").
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_asgd import EMA, Checkpointer, ShardedASGD, Uniform
from dist_asgd.sharding.sharded_state import StatePiece
from tests.support.ranks import run_ranks

DATA = Path(__file__).parent / "data" / "0.1"
STEP = 6


def build():
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    opt = ShardedASGD(model.named_parameters(), lr=0.1, t0=2, average={"mean": Uniform(), "ema": EMA(0.5)})
    return model, opt


def expected():
    return torch.load(DATA / "expected.pt")


def require_equal(found, wanted, where="root"):
    """Compares trees of dicts, lists, tensors and plain values, bit for bit."""
    if isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted), where
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key in wanted:
            require_equal(found[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted), where
        for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
            require_equal(one, other, f"{where}[{index}]")
    else:
        assert found == wanted, where


def load_state_dict(rank, weights_only):
    model, opt = build()
    model.load_state_dict(expected()["model"])
    opt.load_state_dict(torch.load(DATA / f"state_dict.rank{rank}.pt", weights_only=weights_only))
    full = opt.full_state_dict()
    if rank == 0:
        require_equal(full, expected()["full"])
    with opt.averaged_parameters("ema"):
        require_equal(dict(model.state_dict()), expected()["ema"])


@pytest.mark.parametrize("weights_only", [True, False])
def test_pickled_state_dicts_load(weights_only):
    run_ranks(2, load_state_dict, weights_only)


def test_pickled_pieces_load_with_an_import_of_the_package_alone():
    code = (
        "import torch, dist_asgd\n"
        "for weights_only in (True, False):\n"
        f"    state = torch.load({str(DATA / 'state_dict.rank1.pt')!r}, weights_only=weights_only)['state']\n"
        "    print({type(entry['ax']).__module__ for entry in state.values()})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(StatePiece.__module__) == 2


def resume(rank, url):
    model, opt = build()
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 3)
    state = {"model": model, "optimizer": opt, "scheduler": scheduler, "data": {"epoch": 0}}
    with Checkpointer(url) as checkpointer:
        assert checkpointer.load(state) == STEP
    wanted = expected()
    require_equal(dict(model.state_dict()), wanted["model"])
    full = opt.full_state_dict()
    if rank == 0:
        require_equal(full, wanted["full"])
    for name in ("mean", "ema"):
        with opt.averaged_parameters(name):
            require_equal(dict(model.state_dict()), wanted[name])
    assert state["data"] == {"epoch": 1}
    assert scheduler.last_epoch == STEP and scheduler.get_last_lr() == [opt.param_groups[0]["lr"]]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_checkpoints_load(tmp_path, world_size):
    shutil.copytree(DATA / "run", tmp_path / "run")
    run_ranks(world_size, resume, str(tmp_path / "run"))


@pytest.mark.parametrize("average", ["mean", "ema"])
def test_averages_in_checkpoints_load_into_a_model(tmp_path, average):
    shutil.copytree(DATA / "run", tmp_path / "run")
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    with Checkpointer(str(tmp_path / "run")) as checkpointer:
        assert checkpointer.load({"model": model}, average=average) == STEP
    require_equal(dict(model.state_dict()), expected()[average])
