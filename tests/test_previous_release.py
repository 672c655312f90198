"""What version 0.1 (commit 239652c) has saved still loads: torch.save's state dicts, and checkpoints.

The files in tests/data/0.1 were made by two ranks that trained ``build()`` for six steps, the inputs of step s drawn
after torch.manual_seed(s), then called Checkpointer.save, torch.save(optimizer.state_dict()) on each rank, and
full_state_dict(). expected.pt holds plain tensors: the parameters, both averages, and the full state dict.
"""

import shutil
from pathlib import Path

import pytest
import torch

from dist_asgd import EMA, Checkpointer, ShardedASGD, Uniform
from tests.support.ranks import run_ranks

DATA = Path(__file__).parent / "data" / "0.1"


def build():
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    kinds = {"mean": Uniform(), "ema": EMA(0.5)}
    optimizer = ShardedASGD(model.named_parameters(), lr=0.1, t0=2, average=kinds)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_equal(found[key], value)
        elif isinstance(value, torch.Tensor):
            assert torch.equal(found[key], value), key
        else:
            assert found[key] == value, key


def values(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def load_pickle(rank, weights_only):
    expected = torch.load(DATA / "expected.pt")
    _, optimizer, _ = build()
    optimizer.load_state_dict(torch.load(DATA / f"state_dict.rank{rank}.pt", weights_only=weights_only))
    full = optimizer.full_state_dict()
    if rank == 0:
        assert_equal(full, expected["full"])


@pytest.mark.parametrize("weights_only", [True, False])
def test_a_pickled_state_dict_loads(weights_only):
    run_ranks(2, load_pickle, weights_only)


def load_checkpoint(rank, folder):
    expected = torch.load(DATA / "expected.pt")
    model, optimizer, scheduler = build()
    data = {}
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "data": data}
    assert Checkpointer(folder).load(state) == 6
    assert data == {"epoch": 1} and scheduler.last_epoch == 6
    assert_equal(values(model), expected["model"])
    for name in ("mean", "ema"):
        with optimizer.averaged_parameters(name):
            assert_equal(values(model), expected[name])
        other = build()[0]
        Checkpointer(folder).load({"model": other}, average=name)
        assert_equal(values(other), expected[name])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_checkpoint_loads(ranks, tmp_path):
    shutil.copytree(DATA / "run", tmp_path / "run")  # a run's directory may be swept
    run_ranks(ranks, load_checkpoint, tmp_path / "run")
