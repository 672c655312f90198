"""The code of README.md, run as written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dist_asgd import ShardedASGD
from tests.support.ranks import run_ranks

README = (Path(__file__).parent.parent / "README.md").read_text()
TRAIN, SHIP, SHARD, RESUME = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]])
def test_the_first_screen(launcher, tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    command = [sys.executable, *launcher, "train.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"error of the last iterate ([\d.]+), of the average ([\d.]+)", done.stdout)
    assert len(found) == (2 if launcher else 1)
    assert all(float(averaged) < float(raw) for raw, averaged in found)


def test_sharding_on_two_replicas_of_one_shard():
    def ranks(rank):
        model = torch.nn.Module()
        model.layers = torch.nn.ModuleList([torch.nn.Linear(7, 5), torch.nn.Linear(5, 1)])
        names = {"model": model, "ShardedASGD": ShardedASGD}
        exec(SHARD.replace('"cuda", (2, 4)', '"cpu", (2, 1)'), names)
        for layer in model.layers:
            layer(torch.ones(3, layer.in_features)).sum().backward()
        names["opt"].step()
        return [p.placements[0].is_replicate() for p in model.parameters()]

    assert all(run_ranks(2, ranks)[0])


def test_shipping_the_average(tmp_path):
    def ranks(rank):
        model = torch.nn.Linear(7, 5)
        opt = ShardedASGD(model.named_parameters(), lr=0.1, t0=0)
        for _ in range(5):
            opt.zero_grad()
            model(torch.ones(3, 7)).square().mean().backward()
            opt.step()
        exec(SHIP.replace('"shipped"', repr(f"{tmp_path}/shipped")), {"model": model, "opt": opt})
        return opt.full_state_dict()

    state = run_ranks(2, ranks)[0]["state"]
    found = safetensors.torch.load_file(tmp_path / "shipped" / "model.safetensors")
    assert torch.equal(found["weight"], state[0]["ax"]) and torch.equal(found["bias"], state[1]["ax"])


def test_saving_on_two_ranks_and_resuming_on_three(tmp_path):
    program = RESUME.replace('"checkpoints"', repr(f"{tmp_path}/checkpoints"))

    def work(rank, seed):
        torch.manual_seed(seed)
        model = torch.nn.Linear(7, 5)
        opt = ShardedASGD(model.named_parameters(), lr=0.1, t0=0)
        for _ in range(5):
            opt.zero_grad()
            model(torch.ones(3, 7)).square().mean().backward()
            opt.step()
        names = {"model": model, "opt": opt}
        exec(program, names)
        return names["start"], [p.detach() for p in model.parameters()], opt.full_state_dict()

    start, params, state = run_ranks(2, work, 0)[0]
    assert start == 0
    start, others, other = run_ranks(3, work, 1)[0]
    assert start == 1000
    assert all(map(torch.equal, params, others))
    assert other["state"].keys() == state["state"].keys() == {0, 1}
    for index, entry in state["state"].items():
        assert all(torch.equal(value, other["state"][index][key]) for key, value in entry.items())
