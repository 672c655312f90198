"""load(..., cast=True): dtypes are converted once, also in optimizers and from masters; without it an error says so."""

import logging

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fsspec.implementations.memory import MemoryFileSystem
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from dist_asgd import ShardedASGD, load, save
from dist_asgd.checkpoint import CheckpointError
from dist_asgd.checkpoint.format.casts import rounded
from tests.support.layouts import Model, give_gradients, named_parameters, options_of, place, whole
from tests.support.ranks import run_alone, run_ranks

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def nearest(value, dtype):
    """The element of a 16-bit ``dtype`` nearest to each of ``value`` (fp64), ties to even, found among all of them."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()].sort().values
    wide = every.to(torch.float64)
    at = torch.searchsorted(wide, value).clamp(1, len(wide) - 1)
    low, high = (value - wide[at - 1]).abs(), (value - wide[at]).abs()
    is_odd = (every[at - 1].view(torch.int16) & 1).bool()
    return torch.where((low > high) | ((low == high) & is_odd), every[at], every[at - 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp64_is_rounded_once(dtype):
    generator = torch.Generator().manual_seed(1)
    every = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(torch.float64)
    ties = (every[:-1] + every[1:]) / 2
    ties = ties[ties.isfinite() & (ties < every[every.isfinite()].max())]
    values = torch.cat([ties, ties * (1 + 2**-40), ties * (1 - 2**-40), torch.randn(999, generator=generator).double()])
    values = torch.cat([values, -values])
    assert torch.equal(rounded(values, dtype).double(), nearest(values, dtype).double())
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e300, -1e300, 1e-320, -0.0], dtype=torch.float64)
    assert str(rounded(odd, dtype).tolist()) == str(odd.to(dtype).tolist())
    assert torch.equal(rounded(torch.complex(values, -values), torch.complex32).real, rounded(values, torch.float16))


def tensors(dtype, world_size=1):
    whole = torch.linspace(-3, 3, 35, dtype=torch.float64).reshape(7, 5).to(dtype)
    if world_size == 1:
        return {"d": {"rows": whole, "columns": whole.clone()}}
    mesh = dist.init_device_mesh("cpu", (world_size,))
    return {"d": {name: distribute_tensor(whole, mesh, [Shard(dim)]) for dim, name in enumerate(("rows", "columns"))}}


def cast_on_ranks(rank, folder, is_remote):
    for dtype in FLOATS:
        url = folder / f"own-{str(dtype)[6:]}"
        save(url, tensors(dtype))
        stock = folder / f"stock-{str(dtype)[6:]}"
        dcp.save(tensors(dtype), checkpoint_id=stock)
        for path in (url, stock):
            if is_remote:  # where ranks share what they read
                MemoryFileSystem().put(str(path), f"/{path.name}", recursive=True)
            for other in FLOATS:
                live = tensors(other, 2)
                for tensor in live["d"].values():
                    tensor.zero_()
                load(f"memory://{path.name}" if is_remote else path, live, cast=True)
                expected = rounded(tensors(dtype)["d"]["rows"], other)
                for name, tensor in live["d"].items():
                    assert torch.equal(tensor.full_tensor(), expected), (path, dtype, other, name)


@pytest.mark.parametrize("is_remote", [False, True], ids=["local", "remote"])
def test_every_float_becomes_every_other_on_any_ranks(tmp_path, is_remote):
    run_ranks(2, cast_on_ranks, tmp_path, is_remote)


def test_what_is_not_cast_is_an_error(tmp_path):
    saved = {"f": torch.ones(2), "i": torch.ones(2, dtype=torch.int32), "c": torch.ones(2, dtype=torch.complex64)}
    save(tmp_path, {"d": {**saved, "b": torch.ones(2, dtype=torch.bfloat16)}})
    live = {"f": saved["i"] * 0, "i": saved["f"] * 0, "c": saved["f"] * 0, "b": torch.zeros(2)}
    with pytest.raises(CheckpointError) as error:
        load(tmp_path, {"d": live})
    assert str(error.value).splitlines()[-2:] == [
        "of another dtype, which load(..., cast=True) converts (1):",
        "  d.b: found bfloat16 [2], expected float32 [2]",
    ]
    with pytest.raises(CheckpointError) as error:
        load(tmp_path, {"d": live}, cast=True)
    assert str(error.value).splitlines()[1] == "of another dtype or kind (3):" and "d.b" not in str(error.value)
    assert not any(tensor.any() for tensor in live.values())
    live = {"c": (target := torch.zeros(2, dtype=torch.complex128)), "b": live["b"]}
    load(tmp_path, {"d": live}, cast=True, strict=False)
    assert target.tolist() == [1, 1] and live["b"].tolist() == [1, 1]


def trained(layout, dtype, steps=5):
    model = place(layout, Model().to(dtype))
    optimizer = ShardedASGD(list(named_parameters(model).items()), **options_of(layout, model), lr=0.05, t0=2)
    train(model, optimizer, range(steps))
    return model, optimizer


def train(model, optimizer, steps):
    for step in steps:
        give_gradients(named_parameters(model), step)
        optimizer.step()
        optimizer.zero_grad()


def masters_on_ranks(rank, folder, layout):
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("dist_asgd").addHandler(handler)
    logging.getLogger("dist_asgd").setLevel(logging.INFO)
    model, optimizer = trained(layout, torch.bfloat16)
    state = optimizer.full_state_dict()
    masters = [entry["master"] for entry in state.get("state", {}).values()]
    averages = [entry["ax"] for entry in state.get("state", {}).values()]
    save(folder / "bf16", {"model": model, "optimizer": optimizer})
    wide, wide_optimizer = trained(layout, torch.float32, 0)
    load(folder / "bf16", {"model": wide, "optimizer": wide_optimizer}, cast=True)
    found = [whole(p).clone() for p in named_parameters(wide).values()]
    state = wide_optimizer.full_state_dict().get("state", {})
    if rank == 0:
        assert len(found) == len(masters) > 3 and all(map(torch.equal, found, masters))
        assert all(map(torch.equal, (entry["ax"] for entry in state.values()), averages))
        assert lines == [f"{folder}/bf16: {len(found)} tensors are cast, such as {lines[0].split('such as ')[1]}"]
    train(wide, wide_optimizer, range(5, 8))
    values = [whole(p).clone() for p in named_parameters(wide).values()]
    save(folder / "fp32", {"model": wide, "optimizer": wide_optimizer})
    narrow, narrow_optimizer = trained(layout, torch.bfloat16, 0)
    load(folder / "fp32", {"model": narrow, "optimizer": narrow_optimizer}, cast=True)
    found = [whole(p).clone() for p in named_parameters(narrow).values()]
    assert all(torch.equal(one, other.to(torch.bfloat16)) for one, other in zip(found, values, strict=True))
    state = narrow_optimizer.full_state_dict().get("state", {})
    assert all(map(torch.equal, (entry["master"] for entry in state.values()), values)) or rank
    train(narrow, narrow_optimizer, range(8, 9))


@pytest.mark.parametrize("layout", ["zero", "fsdp"])
def test_masters_are_what_wider_parameters_take_and_narrower_ones_get(tmp_path, layout):
    run_ranks(2, masters_on_ranks, tmp_path, layout)


def test_a_master_that_its_parameter_has_left_is_not_taken(tmp_path):
    run_alone(left_master, tmp_path)


def left_master(folder):
    def make(dtype):
        model = nn.Linear(3, 1).to(dtype)
        return model, ShardedASGD(model.named_parameters(), lr=0.1)

    model, optimizer = make(torch.bfloat16)
    model(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    master = optimizer.full_state_dict()["state"][0]["master"]
    saved = {"model": model, "optimizer": {"state": {"weight": {"master": master}}, "param_groups": []}}
    with torch.no_grad():
        model.weight[0, 1] = 7
    save(folder, saved)
    wide = nn.Linear(3, 1)
    load(folder, {"model": wide}, cast=True)
    master[0, 1] = 7
    assert torch.equal(wide.weight, master)


@pytest.mark.parametrize(
    "make", [lambda params: torch.optim.Adam(params, lr=0.1), lambda params: torch.optim.Adafactor(params)]
)
def test_state_that_follows_its_parameter_is_cast_with_it(tmp_path, make):
    run_alone(follow, tmp_path, make)


def follow(folder, make):
    def built(dtype):
        model = nn.Linear(3, 2).to(dtype)
        return {"model": model, "optimizer": make(model.parameters())}

    def step(state):
        dtype = state["model"].weight.dtype
        state["model"](torch.ones(1, 3, dtype=dtype)).sum().backward()
        state["optimizer"].step()

    def entries(state):
        of_params = state["optimizer"].state_dict()["state"].values()
        return [entry[name] for entry in of_params for name in sorted(entry) if entry[name].ndim]

    for dtype, other in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        state = built(dtype)
        step(state)
        save(folder / str(other), state)
        for fresh in (True, False):
            live = built(other)
            if not fresh:
                step(live)
            load(folder / str(other), live, cast=True)
            assert entries(live) and len(entries(live)) == len(entries(state))
            for one, two in zip(entries(live), entries(state), strict=True):
                assert one.dtype == other and torch.equal(one, two.to(other))
            step(live)
