"""Checkpointer, save and load: what is saved by some ranks is loaded by others, bit for bit, or nothing changes."""

import json
import logging
import os
import re
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor

import dist_asgd
from dist_asgd import Checkpointer
from dist_asgd.checkpoint import CheckpointError, RandomState, checkpointer, progress
from tests.support.layouts import Model, build
from tests.support.portability import LAST, OPTIONS, SAVED, check, reference, train
from tests.support.ranks import Sent, message_of, run_alone, run_ranks

# 0-d, empty, fewer rows than ranks, odd sizes in one to three dims
SHAPES = [(), (0,), (5, 0), (1,), (3,), (1001,), (7, 13), (2, 300), (5, 3, 11)]
DTYPES = [torch.float32, torch.bfloat16, torch.complex64, torch.int64]


def truth(shape, dtype):
    """The whole tensor that is saved, of any bits."""
    generator = torch.Generator().manual_seed(len(shape) + 7 * sum(shape))
    values = torch.randint(-(2**31), 2**31, (*shape, dtype.itemsize // 2), generator=generator).to(torch.int16)
    return values.view(dtype).reshape(shape) if values.numel() else torch.empty(shape, dtype=dtype)


def same_bits(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)


def bits(tensor):
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist()) if tensor.numel() else b""


def cut(value, mesh, dim):
    """A parameter of a DTensor that has rows, or columns, of it."""
    return value if dim >= value.ndim else distribute_tensor(value, mesh, [Shard(dim)])


def tensors(fill, world_size):
    """Of each shape and dtype a plain tensor, and DTensors cut along the first and along the second dim."""
    mesh = init_device_mesh("cpu", (world_size,))
    wholes = {f"{shape}{dtype}": truth(shape, dtype) for shape in SHAPES for dtype in DTYPES}
    if not fill:
        wholes = {name: torch.zeros_like(value) for name, value in wholes.items()}
    return {
        "plain": {name: value.clone() for name, value in wholes.items()},
        "rows": {name: cut(value, mesh, 0) for name, value in wholes.items()},
        "columns": {name: cut(value, mesh, 1) for name, value in wholes.items()},
    }


LOADED = {1: (4,), 2: (1, 3), 3: (2, 4), 4: (3, 4)}  # numbers of ranks that have saved, by how many load


def save_tensors(rank, url, world_size):
    dist_asgd.save(f"{url}/{world_size}", tensors(True, world_size))


def load_tensors(rank, url, world_size):
    expected = tensors(True, world_size)
    for saved_by in LOADED[world_size]:
        state = tensors(False, world_size)
        with Sent() as sent:
            dist_asgd.load(f"{url}/{saved_by}", state)
        for name, values in expected.items():
            for key, value in values.items():
                mine, whole = (x.to_local() if isinstance(x, DTensor) else x for x in (state[name][key], value))
                assert same_bits(mine, whole), (saved_by, name, key)
        # What ranks tell each other is the manifest and facts; tensors are read by whoever needs them.
        assert sum(sent.sizes) < 40 * os.path.getsize(f"{url}/{saved_by}/manifest.json")


def test_every_world_size_loads_what_others_have_saved(tmp_path):
    for world_size in range(1, 5):
        run_ranks(world_size, save_tensors, str(tmp_path), world_size)
    for world_size in range(1, 5):
        run_ranks(world_size, load_tensors, str(tmp_path), world_size)


SOURCES = [("zero", 1), ("zero", 3), ("ddp", 2), ("fsdp", 3), ("hsdp", 4), ("tp", 2), ("fsdp+tp", 4)]
TARGETS = [("zero", 2), ("ddp", 3), ("fsdp", 2), ("hsdp", 2), ("tp", 4), ("fsdp+tp", 2)]


def save_run(rank, url, layout, world_size):
    model, optimizer = build(layout, **OPTIONS)
    train(model, optimizer, range(SAVED))
    with Checkpointer(f"{url}/{layout}{world_size}") as checkpointer:
        checkpointer.save(SAVED, {"model": model, "optimizer": optimizer})


def resume_run(rank, url, layout):
    at_save, at_end = reference(SAVED), reference(LAST)
    model, optimizer = build(layout, seed=99, **OPTIONS)
    for source, world_size in SOURCES:
        train(model, optimizer, range(50, 52))  # so that there is something else to be loaded over
        with Checkpointer(f"{url}/{source}{world_size}") as checkpointer:
            assert checkpointer.load({"optimizer": optimizer, "model": model}) == SAVED
        check(model, optimizer, at_save, (source, world_size))
    train(model, optimizer, range(SAVED, LAST))
    check(model, optimizer, at_end, "trained on")


def resume_without_ranks(url):
    """Into torch.optim.ASGD, fresh, in one process: by ours and by stock torch.distributed.checkpoint."""
    expected = reference(LAST)
    for source, world_size in SOURCES:
        for stock in (False, True):
            model = Model(seed=99)
            optimizer = torch.optim.ASGD(model.named_parameters(), foreach=False, **OPTIONS)
            folder = next(Path(f"{url}/{source}{world_size}").glob("step-*"))
            if stock:
                train(model, optimizer, range(50, 51))  # it loads only into what is there
                state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
                dcp.load(state, checkpoint_id=folder, no_dist=True)
                set_optimizer_state_dict(model, optimizer, state["optimizer"])
            else:
                dist_asgd.load(folder, {"model": model, "optimizer": optimizer})
            train(model, optimizer, range(SAVED, LAST))
            for (name, param), twin in zip(model.named_parameters(), expected[0].parameters(), strict=True):
                assert torch.equal(param, twin), (source, world_size, stock, name)
                assert torch.equal(optimizer.state[param]["ax"], expected[1].state[twin]["ax"]), (source, stock, name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A training that was saved under several layouts."""
    url = str(tmp_path_factory.mktemp("runs"))
    for layout, world_size in SOURCES:
        run_ranks(world_size, save_run, url, layout, world_size)
    return url


@pytest.mark.parametrize(("layout", "world_size"), TARGETS)
def test_every_layout_goes_on_from_every_other(runs, layout, world_size):
    run_ranks(world_size, resume_run, runs, layout)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_asgd_goes_on_from_every_layout(runs):
    run_alone(resume_without_ranks, runs)


def small(value):
    model = nn.Linear(3, 2)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(value)
    return model


def test_newest_given_and_no_step(tmp_path):
    checkpointer, model = Checkpointer(tmp_path / "run"), small(0)
    assert (checkpointer.steps(), checkpointer.latest()) == ([], None)
    assert checkpointer.load({"model": model}) is None
    for step in (3, 20, 100):
        url = checkpointer.save(step, {"model": small(step), "data": {"epoch": step, "seen": [step, None]}})
        assert Path(url).is_dir()
    state = {"model": model, "data": {"epoch": 0, "seen": []}}
    assert checkpointer.load(state) == 100
    assert state["data"] == {"epoch": 100, "seen": [100, None]}
    assert model.weight.eq(100).all()
    assert checkpointer.load({"model": model}, step=20) == 20
    assert model.weight.eq(20).all()
    assert checkpointer.steps() == [3, 20, 100]
    assert "step 21" in message_of(lambda: checkpointer.load({"model": model}, step=21), CheckpointError)
    checkpointer.save(20, {"model": small(7)})
    assert checkpointer.load({"model": model}, step=20) == 20
    assert model.weight.eq(7).all(), "the later save of a step counts"


def test_what_has_no_manifest_does_not_exist(tmp_path):
    checkpointer, model = Checkpointer(tmp_path), small(0)
    for step in (1, 2):
        last = checkpointer.save(step, {"model": small(step)})
    os.remove(f"{last}/manifest.json")
    assert checkpointer.load({"model": model}) == 1
    assert "manifest.json" in message_of(lambda: dist_asgd.load(last, {"model": model}), CheckpointError)
    assert "not empty" in message_of(lambda: dist_asgd.save(last, {"model": model}), CheckpointError)


def test_retention_counts_committed_checkpoints_only(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep_last=2, keep_every=10, pinned=[3, 4])
    state = {"model": small(1)}
    abandoned = checkpointer.save(0, state)
    os.remove(f"{abandoned}/manifest.json")
    young = checkpointer.save(1, state)
    os.remove(f"{young}/manifest.json")
    past = time.time() - 2 * 3600
    for file in [abandoned, *Path(abandoned).iterdir()]:
        os.utime(file, (past, past))
    for step in range(2, 14):
        checkpointer.save(step, state)
    assert checkpointer.steps() == [3, 4, 10, 12, 13]
    assert not Path(abandoned).exists()
    assert Path(young).exists(), "its writer may still be at work"
    assert len(list(tmp_path.glob("step-*"))) == 6
    for wrong in (0, -1, True, 2.5):
        message_of(lambda wrong=wrong: Checkpointer(tmp_path, keep_last=wrong), ValueError)


@pytest.mark.parametrize("moment", ["found", "opened"])
def test_a_checkpoint_that_is_deleted_while_it_is_loaded_gives_way_to_a_newer_one(tmp_path, monkeypatch, moment):
    writer = Checkpointer(tmp_path, keep_last=1)
    writer.save(1, {"x": torch.full((5,), 1.0)})
    open_source = checkpointer.open_source

    def overtaken(agreement, storage, name, *args, **kwargs):
        monkeypatch.setattr(checkpointer, "open_source", open_source)
        opened = open_source(agreement, storage, name, *args, **kwargs) if moment == "opened" else None
        writer.save(2, {"x": torch.full((5,), 2.0)})
        return opened or open_source(agreement, storage, name, *args, **kwargs)

    state = {"x": torch.zeros(5)}
    monkeypatch.setattr(checkpointer, "open_source", overtaken)
    assert Checkpointer(tmp_path).load(state) == 2
    assert (state["x"] == 2).all()
    monkeypatch.setattr(checkpointer, "open_source", overtaken)
    message = message_of(lambda: Checkpointer(tmp_path).load(state, step=2), CheckpointError)
    assert "step-00000002" in message


def test_links_to_steps_count_and_retention_removes_the_links_alone(tmp_path):
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    url = Path(Checkpointer(elsewhere).save(1, {"x": torch.ones(2)}))
    with Checkpointer(run, keep_last=2) as checkpointer:
        last = Path(checkpointer.save(2, {"x": torch.zeros(2)}))
        (run / url.name).symlink_to(url)
        (last / "circle").symlink_to(last)
        assert checkpointer.steps() == [1, 2]
        state = {"x": torch.zeros(2)}
        assert checkpointer.load(state, step=1) == 1 and state["x"].tolist() == [1, 1]
        assert checkpointer.load(state) == 2
        checkpointer.save(3, state)
        assert checkpointer.steps() == [2, 3]
        checkpointer.save(4, state)
    assert not last.exists()
    assert not (run / url.name).is_symlink() and Checkpointer(elsewhere).load(state) == 1


def test_what_is_no_state_is_refused(tmp_path):
    checkpointer = Checkpointer(tmp_path / "run")
    for state in (small(1), [torch.ones(2)], None):
        for call in (checkpointer.load, lambda state: checkpointer.save(1, state)):
            assert "a dict, by names" in message_of(lambda state=state, call=call: call(state), TypeError)
    assert checkpointer.steps() == []
    dist_asgd.save(tmp_path / "empty", {})
    state = {}
    dist_asgd.load(tmp_path / "empty", state)
    assert state == {}


NO_MEMORY = {
    "TwoTensor": lambda: TwoTensor(torch.ones(3), torch.ones(3)),
    "sparse_coo": lambda: torch.ones(3).to_sparse(),
    "meta": lambda: torch.empty(3, device="meta"),
}


def save_and_load_nothing(folder, kind):
    checkpointer = Checkpointer(folder)
    checkpointer.save(1, {"here": {"x": torch.zeros(3)}})
    state = {"here": {"x": NO_MEMORY[kind]()}}
    for call in (lambda: checkpointer.save(2, state), lambda: checkpointer.load(state)):
        message = message_of(call, TypeError, CheckpointError)
        assert "here.x" in message and (kind in message or "of another" in message)
    assert checkpointer.steps() == [1]


@pytest.mark.parametrize("kind", NO_MEMORY)
def test_tensors_without_memory_of_their_own_are_refused(tmp_path, kind):
    run_alone(save_and_load_nothing, tmp_path, kind)


def overlap(rank, folder):
    buffer = torch.arange(12.0)
    views = {"first": buffer[:8], "second": buffer[4:], "tied": buffer[:8], "columns": buffer.view(3, 4).t()}
    odd = torch.as_strided(torch.arange(8.0), (3, 2), (2, 3))  # its strides look like an overlap, and make none
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(1, {**views, "odd": odd, "wide": torch.ones(3, 1).expand(3, 4)})
        buffer.zero_()
        target = torch.as_strided(torch.zeros(8), (3, 2), (2, 3))
        checkpointer.load({**views, "odd": target})
        assert torch.equal(buffer, torch.arange(12.0)) and torch.equal(target, odd)
        shared = torch.zeros(3, 1).expand(3, 4) if rank else torch.zeros(3, 4)
        steps = torch.as_strided(torch.zeros(6), (4, 3), (1, 1)) if rank else torch.zeros(4, 3)
        for state in ({"wide": shared}, {"first": torch.zeros(8), "columns": steps}):
            message = message_of(lambda state=state: checkpointer.load(state), TypeError)
            assert re.search("rank 1: (wide|columns) has several elements in one place", message), message
            assert not any(tensor.any() for tensor in state.values())
        checkpointer.save(2, {"a": torch.ones(2000), "b": torch.zeros(2000) + 2})
        tied = torch.zeros(2000)
        state = {"a": tied, "b": tied if rank else torch.zeros(2000)}
        message = message_of(lambda: checkpointer.load(state), CheckpointError)
        assert "rank 1" in message and "'a' and 'b' are one tensor here" in message and not tied.any()


def test_tensors_that_share_memory(tmp_path):
    """Views of one buffer and tied tensors are loaded; elements in one place, and ties that were none, are refused."""
    run_ranks(2, overlap, tmp_path)


def test_a_tensor_that_is_still_on_its_way(tmp_path):
    """As functional collectives give it."""
    dist_asgd.save(tmp_path / "x", {"x": AsyncCollectiveTensor(torch.ones(3))})
    state = {"x": AsyncCollectiveTensor(torch.zeros(3))}
    dist_asgd.load(tmp_path / "x", state)
    assert state["x"].wait().tolist() == [1, 1, 1]


def disagreeing(rank, url):
    checkpointer, state = Checkpointer(url), {"x": torch.ones(2), "x@rank1": torch.zeros(2)}
    texts = [
        message_of(lambda: checkpointer.save(rank, state), ValueError),
        message_of(lambda: checkpointer.save(1, state, wait=rank == 0), ValueError),
        message_of(lambda: checkpointer.load(state, step=rank), ValueError),
    ]
    state["x"].fill_(rank)
    texts.append(message_of(lambda: checkpointer.save(1, state), CheckpointError))
    assert checkpointer.steps() == []
    return texts


def test_ranks_that_disagree_are_told(tmp_path):
    texts = run_ranks(2, disagreeing, str(tmp_path))
    assert texts[0] == texts[1]
    for text, part in zip(texts[0], ("step = 1 on rank 1", "wait = ", "step = ", "the key x@rank1"), strict=True):
        assert part in text


def test_one_error_lists_everything_and_nothing_changes(tmp_path):
    saved = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2).double()})
    dist_asgd.save(tmp_path / "x", {"model": saved, "data": {"epoch": 1}})
    model = nn.ModuleDict({"a": nn.Linear(4, 2), "c": nn.Linear(2, 2), "d": nn.Linear(2, 2)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = {"step": 5}
    message = message_of(lambda: dist_asgd.load(tmp_path / "x", {"model": model, "data": data}), CheckpointError)
    for part in ("model.a.weight", "[2, 3]", "[2, 4]", "model.b.bias", "model.c.weight", "float64", "model.d.weight"):
        assert part in message
    assert "data.step" in message
    assert data == {"step": 5}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    loose = nn.ModuleDict({"b": nn.Linear(2, 2), "d": nn.Linear(2, 2)})
    weight = loose["d"].weight.clone()
    dist_asgd.load(tmp_path / "x", {"model": loose}, strict=False)
    assert torch.equal(loose["b"].weight, saved["b"].weight)
    assert torch.equal(loose["d"].weight, weight)


def averaged(rank, url):
    model, optimizer = build("zero", **OPTIONS)
    train(model, optimizer, range(SAVED))
    dist_asgd.save(url, {"model": model, "optimizer": optimizer})
    other = Model(seed=3)
    dist_asgd.load(url, {"model": other}, average=True)
    with optimizer.averaged_parameters():
        for (name, param), mine in zip(model.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(param, mine), name
    dist_asgd.load(url, {"optimizer": optimizer})


def test_averages_load_into_the_model(tmp_path):
    run_ranks(2, averaged, f"{tmp_path}/x")


def own_values(rank, url, world_size):
    state = {
        "rng": RandomState(),
        "data": {"shard": rank, "epoch": 4, "order": torch.arange(3) + rank, "same": torch.ones(2)},
    }
    torch.manual_seed(rank)
    if world_size == 2:
        dist_asgd.save(url, state)
        return torch.rand(3)
    wrong = {"data": {"shard": -1, "epoch": -1, "order": torch.zeros(3).long(), "same": torch.zeros(2)}}
    message = message_of(lambda: dist_asgd.load(url, wrong), CheckpointError)
    assert "data.shard" in message
    assert "data.order" in message
    assert "data.epoch" not in message
    assert wrong["data"]["epoch"] == -1
    dist_asgd.load(url, wrong, strict=False)
    assert wrong["data"]["epoch"] == 4
    assert wrong["data"]["same"].eq(1).all()
    assert wrong["data"]["shard"] == (rank if rank < 2 else -1)
    dist_asgd.load(url, {"rng": RandomState()})
    return torch.rand(3)


def test_each_rank_gets_its_own_values_back(tmp_path):
    url = f"{tmp_path}/x"
    expected = run_ranks(2, own_values, url, 2)
    found = run_ranks(3, own_values, url, 3)
    assert all(torch.equal(one, other) for one, other in zip(expected, found[:2], strict=True))


class Own:
    """Something with a state that has other keys on each rank."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def own_keys(rank, url):
    here = {"same": torch.ones(2), f"of {rank}": torch.full((rank + 1,), 5.0), "steps": {f"{rank}": rank}}
    dist_asgd.save(url, {"it": Own(here)})
    it = Own({})
    dist_asgd.load(url, {"it": it})
    assert it.state.keys() == here.keys() and it.state["steps"] == here["steps"]
    assert torch.equal(it.state[f"of {rank}"], here[f"of {rank}"])


def test_each_rank_may_have_keys_of_its_own(tmp_path):
    run_ranks(2, own_keys, f"{tmp_path}/x")


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def told(rank, url):
    """What the log has of a save and a load: as they are, and if anything took long."""
    lines = Lines()
    logging.getLogger("dist_asgd").addHandler(lines)
    logging.getLogger("dist_asgd").setLevel(logging.INFO)
    state = {"x": torch.ones(3 * 2**20)}
    with Checkpointer(url) as checkpointer:
        checkpointer.save(1, state)
        checkpointer.load(state)
        short = list(lines.lines)
        progress.EVERY = 0
        checkpointer.save(2, state)
        checkpointer.load(state)
    return short, lines.lines[len(short) :]


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_what_takes_long_is_told_by_the_first_rank(tmp_path, protocol):
    if protocol == "memory":
        (answer,) = [run_alone(told, 0, "memory://progress")]
    else:
        answer, *others = run_ranks(2, told, str(tmp_path))
        assert others == [([], [])]
    short, long = answer
    assert short == []
    share = 12.0 if protocol == "memory" else 6.0
    for doing, mib in [("saving", share), ("reading and verifying", 12.0), ("loading", 12.0)]:
        (*_, last) = [line for line in long if line.startswith(f"{doing} ")]
        assert re.search(rf"step-00000002-0001-\w+: {mib} of {mib} MiB of rank 0's share, [\d.]+ MiB/s$", last), long


def background(rank, url):
    model, optimizer = build("zero", **OPTIONS)
    train(model, optimizer, range(SAVED))
    checkpointer = Checkpointer(url)
    state = {"model": model, "optimizer": optimizer}
    for step in range(SAVED, LAST):
        checkpointer.save(step, state, wait=False)
        train(model, optimizer, range(step, step + 1))  # changes what is being saved
    at_end = reference(LAST)
    check(model, optimizer, at_end, "trained under saves")
    checkpointer.close()
    assert checkpointer.steps() == list(range(SAVED, LAST))
    model, optimizer = build("zero", seed=3, **OPTIONS)
    with Checkpointer(url) as checkpointer:
        checkpointer.load({"model": model, "optimizer": optimizer}, step=SAVED)
    check(model, optimizer, reference(SAVED), "as it was when save() was called")


def test_saves_in_the_background_have_what_was_there_when_they_were_asked_for(tmp_path):
    run_ranks(2, background, str(tmp_path))


def failing(rank, url, wait):
    """Ranks but 0 cannot write."""
    checkpointer, state = (
        Checkpointer(url),
        {"model": small(1), "rows": DTensor.from_local(torch.ones(2**20), everyone())},
    )
    checkpointer.save(1, state)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if wait:
        message = message_of(lambda: checkpointer.save(2, state), CheckpointError)
    else:
        checkpointer.save(2, state, wait=False)
        message = message_of(checkpointer.wait, CheckpointError)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpointer.load(state) == 1
    checkpointer.save(3, state)
    assert checkpointer.steps() == [1, 3]
    return message


def everyone():
    return init_device_mesh("cpu", (dist.get_world_size(),))


@pytest.mark.parametrize("wait", [True, False])
def test_a_rank_that_cannot_write_fails_the_save_of_all(tmp_path, wait):
    messages = run_ranks(3, failing, str(tmp_path), wait)
    assert all("File too large" in message for message in messages), messages


def ended(rank, url):
    """The main thread ends by itself while a save is under way."""
    checkpointer = Checkpointer(url)
    checkpointer.save(1, {"x": torch.ones(1000, 1000)}, wait=False)
    thread = next(thread for thread in threading.enumerate() if thread.name == "dist_asgd checkpoint")
    assert not thread.daemon
    thread.join()
    return checkpointer.steps()


def test_a_save_outlives_the_main_thread(tmp_path):
    assert run_alone(ended, 0, str(tmp_path)) == [1]


def test_the_manifest_tells_what_is_there(tmp_path):
    dist_asgd.save(tmp_path / "x", {"model": small(2), "note": "hello"})
    manifest = json.loads((tmp_path / "x" / "manifest.json").read_text())
    assert manifest["tensors"]["model.weight"]["shape"] == [2, 3]
    assert manifest["world_size"] == 1
    shutil.copytree(tmp_path / "x", tmp_path / "y")
    model = small(0)
    dist_asgd.load(tmp_path / "y", {"model": model})
    assert model.bias.eq(2).all()


def statistics(rank, url):
    """Every rank has its own batches, as in DistributedDataParallel without SyncBatchNorm."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(4))
    for module in model:
        module.running_mean.fill_(rank)
        module.running_var.fill_(rank)
    dist_asgd.save(url, {"model": model})
    dist_asgd.load(url, {"model": model})
    return [value.max().item() for name, value in model.state_dict().items() if "running" in name]


def test_buffers_that_differ_are_all_of_the_first_rank(tmp_path):
    assert run_ranks(3, statistics, f"{tmp_path}/x") == [[0.0] * 4] * 3
