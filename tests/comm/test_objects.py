"""Objects between ranks by torch alone, and the whole package where NumPy cannot be imported."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch.distributed as dist

from dist_asgd.comm.objects import all_gather_object, broadcast_object, gather_object, scatter_object
from tests.support.ranks import run_ranks

LARGE = "x" * 3_000_000


def items(world_size):
    """One object a rank, of different types and sizes."""
    return [None, LARGE, {"a": (1, 2.5)}, b""][:world_size]


def ranks(rank, world_size):
    group = dist.group.WORLD
    everyone, nothing = items(world_size), ["ignored"]
    return (
        all_gather_object(everyone[rank], group),
        gather_object(everyone[rank], group),
        scatter_object(everyone if rank == 0 else nothing, group),
        broadcast_object(everyone[-1] if rank == 0 else nothing, group),
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_gets_the_objects_meant_for_it(world_size):
    everyone = items(world_size)
    for rank, found in enumerate(run_ranks(world_size, ranks, world_size)):
        assert found == (everyone, [] if rank else everyone, everyone[rank], everyone[-1])


def test_one_process_without_torch_distributed_keeps_its_object():
    item = object()
    assert all_gather_object(item, None) == gather_object(item, None) == [item]
    assert scatter_object([item], None) is broadcast_object(item, None) is item


def subgroups(rank):
    group = dist.new_group([1, 2])
    if rank == 0:
        return None
    own = f"of rank {rank}"
    return (
        all_gather_object(own, group),
        gather_object(own, group),
        scatter_object(["first", "second"], group),
        broadcast_object(own, group),
    )


def test_ranks_are_those_of_the_group():
    both = ["of rank 1", "of rank 2"]
    expected = [(both, both, "first", "of rank 1"), (both, [], "second", "of rank 1")]
    assert run_ranks(3, subgroups)[1:] == expected


PROGRAM = textwrap.dedent("""
    import sys
    import tempfile

    class WithoutNumPy:
        # Finds what another finder finds, except NumPy.

        def __init__(self, finder):
            self.finder = finder

        def __getattr__(self, name):
            return getattr(self.finder, name)

        def find_spec(self, name, path=None, target=None):
            return None if name.partition(".")[0] == "numpy" else self.finder.find_spec(name, path, target)

    sys.meta_path[:] = map(WithoutNumPy, sys.meta_path)

    import torch
    import torch.distributed as dist
    from dist_asgd import Checkpointer, NonMonotonicTrigger, ShardedASGD, export
    from dist_asgd.checkpoint.state.rng import RandomState

    rank, folder = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)

    def built():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 2))
        return model, ShardedASGD(model.named_parameters(), lr=0.1, t0=0)

    def step(model, optimizer):
        model(torch.full((4, 5), 1.0 + rank)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def state_of(model, optimizer):
        rng = RandomState()
        return {"model": model, "optimizer": optimizer, "epoch": 3, "of this rank": [rank], "rng": rng}

    model, optimizer = built()
    for _ in range(3):
        step(model, optimizer)
    with optimizer.averaged_parameters():
        averaged = [p.clone() for p in model.parameters()]
    assert any(not torch.equal(a, p) for a, p in zip(averaged, model.parameters()))
    full = optimizer.full_state_dict()
    assert sorted(full) == ([] if rank else ["param_groups", "state"])
    assert not NonMonotonicTrigger().step(1.0)

    checkpointer = Checkpointer(f"{folder}/run")
    checkpointer.save(1, state_of(model, optimizer))
    checkpointer.save(2, state_of(model, optimizer), wait=False)
    checkpointer.wait()
    again = built()
    state = state_of(*again) | {"epoch": 0, "of this rank": []}
    assert checkpointer.load(state) == 2
    assert state["epoch"] == 3 and state["of this rank"] == [rank]
    step(model, optimizer)
    step(*again)
    assert all(map(torch.equal, model.parameters(), again[0].parameters()))
    export(f"{folder}/model.pt", model)

    try:
        optimizer.load_state_dict({"state": {}, "param_groups": []} if rank else optimizer.state_dict())
    except ValueError as error:
        assert "rank 1" in str(error)
    else:
        raise AssertionError("no error")
    assert "numpy" not in sys.modules
    dist.destroy_process_group()
""")


def test_nothing_needs_numpy(tmp_path):
    """Two ranks train, average, save and load in processes that cannot import NumPy."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "GLOO_SOCKET_IFNAME": "lo"}
    program = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    processes = [
        subprocess.Popen([*program, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
