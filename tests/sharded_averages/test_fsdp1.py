"""Averages of FSDP1's slices, whole and in checkpoints, on other numbers of ranks and under other layouts."""

import pytest
import torch

from dist_asgd import Checkpointer, ShardedAverages
from tests.support.beside import KINDS, build
from tests.support.fsdp1 import backward, model_state, wrap
from tests.support.iterates import averaged
from tests.support.layouts import Model
from tests.support.ranks import run_ranks

STEPS = 4


def built(strategy):
    model = wrap(Model(0), strategy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, ShardedAverages(model.named_parameters(), KINDS, optimizer=optimizer, module=model)


def save(rank, strategy, folder):
    model, optimizer, averages = built(strategy)
    iterates = []
    for step in range(STEPS):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        iterates.append(model_state(model))
    found = {name: averages.full_state_dict(name) for name in KINDS}
    for name, kind in KINDS.items():
        expected = averaged(iterates, kind)
        assert all(torch.equal(found[name][key], expected[key]) for key in found[name])
        with averages.averaged_parameters(name):
            inside = model_state(model)
        assert all(torch.equal(inside[key], expected[key]) for key in expected)
    after = model_state(model)
    assert all(torch.equal(iterates[-1][key], after[key]) for key in after)
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(STEPS, {"averages": averages})
    return found


def resume_fsdp1(rank, strategy, folder, expected):
    _, _, averages = built(strategy)
    check(averages, folder, expected)


def resume(rank, layout, folder, expected):
    _, _, averages = build(layout)
    check(averages, folder, expected)


def check(averages, folder, expected):
    with Checkpointer(folder) as checkpoints:
        assert checkpoints.load({"averages": averages}) == STEPS
    for name in KINDS:
        found = averages.full_state_dict(name)
        assert all(torch.equal(found[key], expected[name][key]) for key in found)


@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP"])
def test_slices(tmp_path, strategy):
    expected = run_ranks(2, save, strategy, tmp_path)[0]
    run_ranks(3, resume_fsdp1, "FULL_SHARD", tmp_path, expected)
    run_ranks(2, resume, "fsdp", tmp_path, expected)
