"""load() on directories that stock dcp.save wrote: equal on any number of ranks, and refused with nothing changed."""

import collections
import functools
import os
import random
import shutil

import numpy
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fsspec.implementations.memory import MemoryFileSystem
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dist_asgd import Checkpointer, ShardedASGD, load
from dist_asgd.boxes import Box
from dist_asgd.checkpoint import CheckpointError
from dist_asgd.checkpoint.format.dcp_metadata import StoredChunk, StoredObject, stock_metadata
from dist_asgd.checkpoint.loading import stock_reader
from dist_asgd.checkpoint.stock.items import item_object
from dist_asgd.checkpoint.storage.storage import Storage
from tests.support.items import DTYPES, item, raw_bytes, sample
from tests.support.ranks import message_of, run_alone, run_ranks
from tests.support.stock_checkpoints import Call, harmful, saved, with_description

OPTIMIZERS = {
    "asgd": functools.partial(torch.optim.ASGD, lr=0.05, t0=1),
    "sharded": functools.partial(ShardedASGD, lr=0.05, t0=1, gradients="reduced"),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.05),
    "sgd": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
}


def build(kind, optimizer, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.BatchNorm1d(3))
    if kind == "fsdp":
        fully_shard(model)
    optimizer = OPTIMIZERS[optimizer](model.named_parameters())
    return model, optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5 + seed])


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def bits(model, optimizer):
    """All of the model and of the optimizer's state, by name; of ShardedASGD, on rank 0."""
    names = [name for name, _ in model.named_parameters()]
    if isinstance(optimizer, ShardedASGD):
        state = optimizer.full_state_dict().get("state", {})
        state = {names[number]: entry for number, entry in state.items()}
    else:
        state = {name: optimizer.state[param] for name, param in model.named_parameters()}
    entries = {f"{name}.{key}": whole(value) for name, entry in state.items() for key, value in entry.items()}
    entries |= {name: whole(value) for name, value in model.state_dict().items()}
    return {name: value.clone() for name, value in entries.items()}


def state_of(model, optimizer, form):
    if form == "numbers":
        return optimizer.state_dict()
    return get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=form == "flat")
    )


def save_by_dcp(rank, folder, kind, optimizer, form):
    model, optimizer, scheduler = build(kind, optimizer, 0)
    for step in range(4):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
    data = {"epoch": 3, "numbered": {3: "x"}, "empty": {}, "counts": torch.arange(3), "list": [{"a": 1}, {"b": (2, 3)}]}
    state = {
        "model": model.state_dict(),
        "optim": state_of(model, optimizer, form),
        "scheduler": scheduler,
        "data": data,
    }
    dcp.save(state, checkpoint_id=folder)
    return bits(model, optimizer)


def load_here(rank, folder, kind, optimizer):
    model, optimizer, scheduler = build(kind, optimizer, 1)
    data = {"epoch": 0, "numbered": {3: "y"}, "empty": {}, "counts": torch.zeros(3, dtype=torch.int64), "list": []}
    load(folder, {"model": model, "optim": optimizer, "scheduler": scheduler, "data": data})
    assert scheduler.milestones == collections.Counter([3, 5]) and scheduler.last_epoch == 0
    assert data.pop("counts").tolist() == [0, 1, 2]
    assert data == {"epoch": 3, "numbered": {3: "x"}, "empty": {}, "list": [{"a": 1}, {"b": (2, 3)}]}
    assert all(group["lr"] == 0.05 for group in optimizer.param_groups)
    return bits(model, optimizer)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize(
    ("saving", "loading", "form"),
    [
        ((2, "fsdp", "asgd"), (3, "plain", "sharded"), "names"),
        ((1, "plain", "asgd"), (2, "fsdp", "sharded"), "flat"),
        ((3, "fsdp", "adamw"), (2, "fsdp", "adamw"), "numbers"),
        ((3, "fsdp", "adamw"), (1, "plain", "adamw"), "flat"),
        ((2, "plain", "sgd"), (1, "plain", "sgd"), "names"),
    ],
    ids=str,
)
def test_any_number_of_ranks_to_any_other(tmp_path, saving, loading, form):
    expected = run_ranks(saving[0], save_by_dcp, tmp_path, *saving[1:], form)[0]
    found = run_ranks(loading[0], load_here, tmp_path, *loading[1:])[0]
    assert found.keys() == expected.keys() and len(found) > 12
    for name, value in expected.items():
        assert torch.equal(found[name].to(value.dtype), value), name


# --- parts of tensors ---

TENSORS = {
    "rows": torch.randn(9, 8, generator=torch.Generator().manual_seed(1)),
    "permuted": torch.randn(3, 7, 5, 2, generator=torch.Generator().manual_seed(2)).to(
        memory_format=torch.channels_last
    ),
    "columns": torch.randn(40, 6, generator=torch.Generator().manual_seed(3)).mT,
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "whole": torch.arange(300),
}


def save_tensors(rank, folder):
    mesh = dist.init_device_mesh("cpu", (2,))
    state = {
        name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in TENSORS.items() if tensor.numel() > 1
    }
    dcp.save({"all": {**TENSORS, **state}}, checkpoint_id=folder)


@pytest.mark.parametrize("piece", [None, 64], ids=["at once", "piece by piece"])
@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
def test_tensors_in_any_strides(tmp_path, monkeypatch, piece, remote):
    if piece is not None:
        monkeypatch.setattr(stock_reader, "READ_BYTES", piece)
    run_ranks(2, save_tensors, tmp_path)
    run_ranks(3, load_tensors, tmp_path, remote)


def load_tensors(rank, folder, remote):
    if remote:
        MemoryFileSystem().put(str(folder), "/copied", recursive=True)
    url = "memory://copied" if remote else folder
    mesh = dist.init_device_mesh("cpu", (3,))
    state = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    for name, dim in (("rows", 0), ("permuted", 1), ("columns", 1)):
        state[name] = distribute_tensor(torch.zeros(TENSORS[name].shape), mesh, [Shard(dim)])
    load(url, {"all": state})
    everything = {}
    load(url, everything)
    for name, tensor in TENSORS.items():
        assert torch.equal(whole(state[name]), tensor) and torch.equal(everything["all"][name], tensor), name


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_every_dtype_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(stock_reader, "READ_BYTES", 4096)
    tensors = {str(dtype): sample(dtype, (30, 41)) for dtype in DTYPES}
    write(tmp_path, tensors)
    found = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    load(tmp_path, found)
    for name, tensor in tensors.items():
        assert raw_bytes(found[name]) == raw_bytes(tensor), name


def write(folder, tensors, **objects):
    """A checkpoint of whole tensors and of items, in one file."""
    places, data = {}, b""
    for name, content in [*((name, item(tensor)) for name, tensor in tensors.items()), *objects.items()]:
        places[name] = ("__0_0.distcp", len(data), len(content))
        data += content
    described = {
        name: (
            tensor.dtype,
            tuple(tensor.shape),
            [StoredChunk(Box((0,) * tensor.ndim, tuple(tensor.shape)), *places[name])],
        )
        for name, tensor in tensors.items()
    }
    metadata = stock_metadata(described, {name: StoredObject(*places[name]) for name in objects}, {})
    folder.mkdir(exist_ok=True)
    (folder / "__0_0.distcp").write_bytes(data)
    (folder / ".metadata").write_bytes(metadata)


def test_a_rank_reads_what_it_needs(tmp_path, monkeypatch):
    run_ranks(2, save_tensors, tmp_path)
    read = []

    def counted(self, ranges, original=Storage.read_ranges):
        read.extend(ranges)
        return original(self, ranges)

    monkeypatch.setattr(Storage, "read_ranges", counted)
    monkeypatch.setattr(stock_reader, "GAP", 0)
    load(tmp_path, {"all": {"scalar": torch.zeros(())}}, strict=False)
    assert {stop - start < 2000 for _, start, stop in read} == {True} and len(read) == 2  # local: verified twice


# --- values ---


def test_plain_values_are_what_torch_loads():
    values = [
        *(None, True, 3, -(2**100), 0.1, float("inf"), "text", b"", b"x\xff", 1j, torch.Size([2, 3]), torch.bfloat16),
        *({"a": [1, (2, {3: None})]}, {1, 2}, frozenset({"a"}), collections.OrderedDict(b=1, a=2), random.getstate()),
        *(numpy.float64(0.1), numpy.int64(3), torch.device("cpu", 0), []),
    ]
    for value in values:
        found = item_object(saved(value))
        assert type(found) is type(value) and repr(found) == repr(value)
    for array in (numpy.random.get_state()[1], numpy.arange(6.0).reshape(2, 3), numpy.array(["a", "bc"])):
        found = item_object(saved(array))
        assert found.dtype == array.dtype and numpy.array_equal(found, array)
    first, second, third = item_object(saved((base := torch.arange(6), base[2:], sample(torch.float8_e5m2, (3,)))))
    assert first.tolist() == list(range(6)) and second.data_ptr() == first[2:].data_ptr()
    assert raw_bytes(third) == raw_bytes(sample(torch.float8_e5m2, (3,)))


def test_a_value_that_grows_is_refused():
    value = []
    for _ in range(60):
        value = [value, value]
    with pytest.raises(CheckpointError, match="very often"):
        item_object(saved(value))


def test_a_scalar_of_scalars_is_refused_at_some_depth():
    dtype = b"cnumpy\ndtype\n(X\x02\x00\x00\x00f8\x89\x88tR"
    scalar = b"cnumpy.core.multiarray\nscalar\nq\x00" + dtype + b"q\x01]q\x02"
    with pytest.raises(CheckpointError, match="refer to themselves"):
        item_object(with_description(b"\x80\x02" + scalar + b"h\x00h\x01h\x02\x86Rq\x02" * 20_000 + b"."))


def test_nothing_is_run(tmp_path):
    canary = tmp_path / "canary"
    live = {"w": torch.zeros(2), "value": 0}
    for name, data in harmful(canary):
        write(tmp_path / "c", {"w": torch.ones(2)}, value=with_description(data))
        with pytest.raises(CheckpointError):
            load(tmp_path / "c", live)
        (tmp_path / "c" / ".metadata").write_bytes(data)
        for trust in (False, True):
            with pytest.raises(CheckpointError):
                load(tmp_path / "c", live, trust=trust)
        assert not canary.exists(), name
    assert live["w"].tolist() == [0, 0] and live["value"] == 0


def test_trust_unpickles(tmp_path):
    canary = tmp_path / "canary"
    queue = collections.deque([1, Call(os.system, f"touch {canary}")])
    write(tmp_path / "c", {"w": torch.ones(2)}, value=saved(queue), other=saved(queue))
    live = {"w": torch.zeros(2), "value": None, "other": None}
    with pytest.raises(CheckpointError, match=r"'value': .*collections\.deque.*trust=True"):
        load(tmp_path / "c", live)
    assert live["w"].tolist() == [0, 0] and not canary.exists()
    load(tmp_path / "c", live := {"w": torch.zeros(2)})  # nobody asks for the others
    assert live["w"].tolist() == [1, 1] and not canary.exists()
    load(tmp_path / "c", live := {"value": None}, trust=True)
    assert live == {"value": collections.deque([1, 0])} and canary.exists()


# --- what is wrong ---


def test_all_that_does_not_fit_is_listed(tmp_path):
    run_alone(list_what_does_not_fit, tmp_path)


def list_what_does_not_fit(folder):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.ASGD(model.parameters())
    state = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer), "other": 1, "epoch": 2}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    live = nn.Sequential(collections.OrderedDict(weight=nn.Linear(1, 1)))
    live.weight, live.more = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64)), nn.Parameter(torch.zeros(4))
    state = {"model": live, "optim": torch.optim.ASGD(live.parameters()), "epoch": torch.zeros(1), "new": 0}
    with pytest.raises(CheckpointError) as raised:
        load(folder, state)
    lines = str(raised.value).splitlines()[1:]
    assert [line for line in lines if "param_groups" not in line and "optim.state" not in line] == [
        "missing from the checkpoint (3):",
        "  model.more: expected float32 [4]",
        "  new: expected a value like the int there",
        "unexpected in the checkpoint (6):",
        "  model.bias: float32 [2], nothing here takes it",
        "of another dtype or kind (1):",
        "  epoch: found the value 2, expected float32 [1]",
        "of another dtype, which load(..., cast=True) converts (1):",
        "  model.weight: found float32 [2, 3], expected float64 [2, 3]",
    ]
    assert "  optim.param_groups.0.params: more: the parameter was not in this group" in lines
    assert "  optim.state.bias.ax: float32 [2], nothing here takes it" in lines
    assert not live.weight.any()
    with pytest.raises(CheckpointError, match=r"neither manifest\.json nor \.metadata"):
        Checkpointer(folder.parent).load({}) or load(folder / "nothing", {})


def test_damage_is_refused_with_nothing_changed(tmp_path):
    tensors = {"w": sample(torch.float32, (3, 4)), "x": sample(torch.int64, (5,), 1)}
    write(tmp_path, tensors, value=saved([1, "a"]))
    file = tmp_path / "__0_0.distcp"
    data = file.read_bytes()
    for at in range(0, len(data), 31):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        file.write_bytes(damaged)
        live = {"w": torch.zeros(3, 4), "x": torch.zeros(5, dtype=torch.int64), "value": None}
        try:
            load(tmp_path, live)
        except CheckpointError:
            assert not live["w"].any() and not live["x"].any() and live["value"] is None, at
        else:
            assert raw_bytes(live["w"]) == raw_bytes(tensors["w"]) and raw_bytes(live["x"]) == raw_bytes(tensors["x"])
            assert live["value"] == [1, "a"], at
    file.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp has \d+ bytes, and \d+ are needed"):
        load(tmp_path, {})


@pytest.mark.parametrize("piece", [None, 64], ids=["at once", "piece by piece"])
def test_what_one_rank_finds_damaged_no_rank_loads(tmp_path, monkeypatch, piece):
    if piece is not None:
        monkeypatch.setattr(stock_reader, "READ_BYTES", piece)
    run_ranks(2, save_tensors, tmp_path)
    shutil.copytree(tmp_path, tmp_path / "missing")
    (tmp_path / "missing" / "__1_0.distcp").unlink()
    data = bytearray((tmp_path / "__1_0.distcp").read_bytes())
    data[data.index(raw_bytes(TENSORS["rows"][5:]))] ^= 1
    (tmp_path / "__1_0.distcp").write_bytes(data)
    messages = run_ranks(2, load_damaged, tmp_path)
    assert messages[0] == messages[1]
    assert (
        "rank 1: " in messages[0][0] and "__1_0.distcp is damaged" in messages[0][0] and "'all.rows'" in messages[0][0]
    )
    assert "__1_0.distcp is missing" in messages[0][1] and "disagree on the arguments of load()" in messages[0][2]


def load_damaged(rank, folder):
    rows = distribute_tensor(torch.zeros(9, 8), dist.init_device_mesh("cpu", (2,)), [Shard(0)])
    state = {"all": {"rows": rows}}
    calls = [
        lambda: load(folder, state, strict=False),
        lambda: load(folder / "missing", state, strict=False),
        lambda: load(folder, state, trust=rank == 0),
    ]
    messages = [message_of(call, CheckpointError, ValueError) for call in calls]
    assert not rows.to_local().any()
    return messages
