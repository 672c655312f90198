"""What traces of torch.profiler show of the library."""

from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from dist_asgd import EMA, Checkpointer, ShardedASGD, ShardedAverages
from tests.support.oracle import PLAIN, make_parameters, named
from tests.support.ranks import run_ranks


def names_of_a_trace(rank: int, folder: Path) -> Counter[str]:
    params = make_parameters(PLAIN)
    optimizer = ShardedASGD(named(params), lr=0.1, t0=0, average=EMA(0.9))
    beside = ShardedAverages(named(params), EMA(0.9))
    checkpoints = Checkpointer(folder)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        for _ in range(2):
            torch.stack([p.abs().sum() for p in params]).sum().abs().backward()
            optimizer.step()
            beside.update()
        with optimizer.averaged_parameters():
            pass
        checkpoints.save(1, {"optimizer": optimizer})
        checkpoints.save(2, {"optimizer": optimizer}, wait=False)
        checkpoints.wait()
    return Counter(event.name for event in trace.events() if event.name.startswith("dist_asgd."))


def test_a_trace_names_what_takes_time(tmp_path: Path) -> None:
    for found in run_ranks(2, names_of_a_trace, tmp_path):
        found.pop("dist_asgd.write")  # one of them in a thread, where not every torch records
        reduced = found["dist_asgd.reduce"]
        assert found == {
            "dist_asgd.reduce": reduced,
            "dist_asgd.update": 2 * reduced,
            "dist_asgd.gather": reduced,
            "dist_asgd.swap": 2,
            "dist_asgd.stage": 1,
        }
