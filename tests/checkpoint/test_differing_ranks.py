"""State that differs between ranks: one error, or each rank's own where that is asked for, and never a mixture."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

import dist_asgd
from dist_asgd import Checkpointer, ShardedASGD
from dist_asgd.checkpoint import CheckpointError, PerRank
from tests.support.layouts import Model
from tests.support.ranks import message_of, run_ranks

LARGE = 2**18 + 2  # fp32 elements, more than 1 MiB: tensors of which ranks write parts


def refused(url, state, *parts):
    """The message with which both ways to save refuse `state` and write nothing; it has all `parts`."""
    with Checkpointer(url) as checkpointer:
        text = message_of(lambda: checkpointer.save(1, state), CheckpointError)
        assert message_of(lambda: checkpointer.save(1, state, wait=False), CheckpointError) == text
        assert checkpointer.steps() == []
    dist.barrier()
    assert not [path for path in Path(url).rglob("*") if path.is_file()]
    for part in parts:
        assert part in text, (part, text)
    return text


def linear(value, size=3):
    module = nn.Linear(size, 1)
    nn.init.constant_(module.weight, value)
    nn.init.constant_(module.bias, 0.5)
    return module


def stepped(module, optimizer):
    module(torch.ones(2, module.in_features)).sum().backward()
    optimizer.step()
    return optimizer


def different_states(rank, url):
    texts = [
        refused(f"{url}/small", {"model": linear(rank % 2)}, "model.weight: ranks 0, 2 and rank 1", "PerRank"),
        refused(f"{url}/large", {"model": linear(rank, LARGE)}, "model.weight: rank 0 and rank 1 and rank 2"),
    ]
    module = linear(0)
    optimizer = stepped(module, torch.optim.AdamW(module.parameters()))
    if rank == 2:
        optimizer.state[module.bias]["exp_avg"][0] = -0.0 if optimizer.state[module.bias]["exp_avg"][0] == 0 else 0.0
    text = refused(f"{url}/adamw", {"model": module, "o": optimizer}, "o.state.bias.exp_avg: ranks 0, 1 and rank 2")
    assert "weight" not in text
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1 if rank else 0.2)
    texts += [
        text,
        refused(f"{url}/lr", {"model": module, "o": optimizer}, "o.param_groups.0.lr: rank 0 and ranks 1, 2"),
    ]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0, momentum=0.9)
    if rank:
        stepped(module, optimizer)
    texts.append(
        refused(f"{url}/lacking", {"model": module, "o": optimizer}, "which state o has: rank 0 and ranks 1, 2")
    )
    mesh = init_device_mesh("cpu", (3,))
    local = torch.full((4,), math.nan)
    local[rank % 2] = 1.0
    replicated = nn.ParameterDict({"w": DTensor.from_local(local, mesh, [Replicate()], run_check=False)})
    texts.append(refused(f"{url}/dtensor", {"model": replicated}, "model.w: ranks 0, 2 and rank 1"))
    texts.append(
        refused(f"{url}/ways", {"model": PerRank(module) if rank else module}, "model.weight", "different ways")
    )
    return texts


def test_a_difference_in_what_ranks_share_is_one_error_and_nothing_is_written(tmp_path):
    texts = run_ranks(3, different_states, str(tmp_path))
    assert texts[0] == texts[1] == texts[2]


def buffers(rank, url):
    model = DistributedDataParallel(nn.BatchNorm1d(LARGE))
    model(torch.full((2, LARGE), float(rank + 1)))
    model.module.running_var.fill_(rank + 1)
    expected = model.module.running_mean.clone()
    dist.broadcast(expected, 0)
    dist_asgd.save(url, {"model": model})
    dist_asgd.load(url, {"model": model})
    assert torch.equal(model.module.running_mean, expected)
    assert model.module.running_var.eq(1).all()


def test_buffers_are_those_of_rank_0_and_whole(tmp_path):
    run_ranks(2, buffers, f"{tmp_path}/x")


def per_rank_state(rank):
    module = linear(rank, LARGE)
    optimizer = stepped(module, torch.optim.AdamW(module.parameters(), lr=0.1 * (rank + 1)))
    buffer = nn.BatchNorm1d(2)
    buffer.running_mean.fill_(rank)
    own = {"buffer": buffer, "note": f"of {rank}", "queue": [torch.full((rank + 1,), 7.0)]}
    return {"expert": PerRank(module), "optimizer": PerRank(optimizer), "own": PerRank(own), "n": PerRank(rank)}


def flat(state):
    values = {key: value.value for key, value in state.items()}
    return {
        "expert": values["expert"].state_dict(),
        "optimizer": values["optimizer"].state_dict(),
        "own": {**values["own"], "buffer": values["own"]["buffer"].state_dict()},
        "n": values["n"],
    }


def equal(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def per_rank(rank, url):
    state = per_rank_state(rank)
    expected = copy.deepcopy(flat(state))
    with Checkpointer(url) as checkpointer:
        checkpointer.save(1, state)
        checkpointer.save(2, state, wait=False)
        for step in (1, 2):
            fresh = per_rank_state(5)
            fresh["own"].value["queue"] = [torch.zeros(rank + 1)]
            assert not equal(flat(fresh), expected)
            checkpointer.load(fresh, step=step)
            assert equal(flat(fresh), expected)
        text = message_of(lambda: checkpointer.load({"expert": linear(0, LARGE)}), CheckpointError)
        assert "expert: ranks [0, 1] have saved their own: load it into PerRank" in text


def per_rank_elsewhere(rank, url, world_size):
    state = {"expert": PerRank(linear(9, LARGE))}
    with Checkpointer(url) as checkpointer:
        text = message_of(lambda: checkpointer.load(state), CheckpointError)
        assert "pass strict=False" in text
        assert ("ranks [1] have saved their own, and no rank takes it" if world_size == 1 else "Ranks [0, 1]") in text
        checkpointer.load(state, strict=False)
    assert state["expert"].value.weight.round().eq(rank).all() == (rank < 2)


def test_per_rank_keeps_each_ranks_own(tmp_path):
    url = str(tmp_path)
    run_ranks(2, per_rank, url)
    for world_size in (1, 3):
        run_ranks(world_size, per_rank_elsewhere, url, world_size)


def sharded_per_rank(rank, url):
    module = linear(0, 9)
    optimizer = ShardedASGD(module.named_parameters(), t0=0)
    stepped(module, optimizer)
    return message_of(lambda: dist_asgd.save(url, {"model": module, "o": PerRank(optimizer)}), ValueError)


def test_per_rank_refuses_what_is_sharded_over_ranks(tmp_path):
    texts = run_ranks(2, sharded_per_rank, f"{tmp_path}/x")
    assert texts[0] == texts[1]
    assert "is in a PerRank and sharded over ranks" in texts[0]


def subgroups(rank, url):
    """Experts on ranks {0, 1} and {2, 3}, as one name and with one name for each."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    module = linear(1 + rank // 2, LARGE)
    optimizer = ShardedASGD(module.named_parameters(), lr=0.5, t0=0, process_group=groups[rank // 2])
    for _ in range(3):
        stepped(module, optimizer)
        optimizer.zero_grad()
    one_name = {"expert": PerRank(module), "o": optimizer}
    own_names = {f"expert{rank // 2}": {"model": module, "o": optimizer}}
    dist_asgd.save(f"{url}/one", one_name)
    dist_asgd.save(f"{url}/own", own_names)
    refused(f"{url}/no", {"expert": module, "o": optimizer}, "expert.weight: ranks 0, 1 and ranks 2, 3")
    weight, before = module.weight.detach().clone(), optimizer.full_state_dict()
    for name, state in (("one", one_name), ("own", own_names)):
        for _ in range(2):
            stepped(module, optimizer)
        dist_asgd.load(f"{url}/{name}", state)
        assert torch.equal(module.weight, weight), name
        assert equal(optimizer.full_state_dict(), before), name
    everyone = ShardedASGD(linear(0, LARGE).named_parameters(), lr=0.5, t0=0)
    text = message_of(lambda: dist_asgd.load(f"{url}/one", {"o": everyone}), CheckpointError)
    assert "o: ranks [0, 2] have saved their own" in text
    other = linear(0, LARGE)
    single = {"o": ShardedASGD(other.named_parameters(), t0=0, process_group=dist.new_subgroups(1)[0])}
    text = message_of(lambda: dist_asgd.load(f"{url}/one", single), CheckpointError)
    assert "Ranks [0, 2] have saved their own, and this rank has none there" in text


def test_an_optimizer_on_a_subgroup_has_its_state_kept_for_each_subgroup(tmp_path):
    run_ranks(4, subgroups, str(tmp_path))


def stages(rank, url):
    """Stages of a pipeline, each under its rank's name, at the top and below another name."""
    module = linear(rank, 4 + rank)
    optimizer = stepped(module, torch.optim.AdamW(module.parameters(), lr=0.1 * (rank + 1)))
    everyone = Model()
    state = {f"stage{rank}": {"model": module, "optimizer": optimizer, "step": rank}, "head": everyone}
    inner = {"stages": {f"{rank}": module}}
    expected = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
    with Checkpointer(url) as checkpointer:
        for step, (saved, wait) in enumerate([(state, True), (state, False), (inner, True)]):
            checkpointer.save(step, saved, wait=wait)
            stepped(module, optimizer)
            state[f"stage{rank}"]["step"] = -1
            checkpointer.load(saved)
            assert equal(module.state_dict(), expected[0])
            if saved is state:
                assert equal(optimizer.state_dict(), expected[1])
                assert state[f"stage{rank}"]["step"] == rank
            optimizer.load_state_dict(expected[1])
        text = message_of(lambda: checkpointer.load({"stages": {"9": module}}), CheckpointError)
        assert "stages.9.weight" in text and "unexpected" in text


def test_stages_may_have_keys_of_their_own(tmp_path):
    run_ranks(3, stages, str(tmp_path))


def shared_name(rank, url):
    """Two meshes of two ranks each have blocks of an expert of their own, under one name."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("expert", "shard"))["shard"]
    local = torch.full((2, 3), float(rank // 2))
    expert = nn.ParameterDict({"w": DTensor.from_local(local, mesh, [Shard(0)], run_check=False)})
    return refused(url, {"model": expert}, "model.w: rank 0 and rank 2")


def test_experts_on_meshes_of_their_own_under_one_name(tmp_path):
    assert len(set(run_ranks(4, shared_name, str(tmp_path)))) == 1


@pytest.mark.parametrize("error", [StopIteration(), KeyError(), ValueError(), AssertionError(), OSError()], ids=repr)
def test_no_error_is_empty(tmp_path, error):
    class Broken:
        def state_dict(self):
            raise error

        def load_state_dict(self, state):
            pass

    text = message_of(lambda: dist_asgd.save(tmp_path / "x", {"it": Broken()}), CheckpointError, ValueError)
    assert type(error).__name__ in text.partition(": ")[2]
