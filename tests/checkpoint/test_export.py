"""The average as a product: files for torch, safetensors and transformers, dense state dicts, shards."""

import itertools
import json
import os
import resource
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import fsspec
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import dist_asgd
from dist_asgd import ShardedASGD, export
from dist_asgd.checkpoint import CheckpointError
from dist_asgd.checkpoint.export import gather
from dist_asgd.checkpoint.storage.storage import Storage
from tests.support.layouts import WORLD_SIZES, Model, build, give_gradients, named_parameters, train, whole
from tests.support.memory import map_large_blocks, peak_resident, reset_peak
from tests.support.ranks import RankError, message_of, run_alone, run_ranks
from tests.support.stores import *  # noqa: F403 fixtures

OPTIONS: dict[str, Any] = {"lr": 0.05, "lambd": 1e-3, "t0": 2}
Tensors = dict[str, Tensor]


def read(path: Path) -> Tensors:
    """Any of the forms of an export, by the libraries that are meant to read it."""
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        return {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    return torch.load(path, weights_only=True)


def same(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def averages_of(optimizer: ShardedASGD, names: list[str]) -> Tensors:
    """Of rank 0: by another way than swapping them in."""
    state = optimizer.full_state_dict().get("state", {})
    return {names[index]: entry["ax"] for index, entry in state.items()}


CASES = [*((layout, sizes[-1]) for layout, sizes in WORLD_SIZES.items()), ("zero", 1), ("fsdp", 1), ("fsdp", 3)]


def plain_model() -> nn.Module:
    return Model(seed=7)


@pytest.mark.parametrize(("layout", "world_size"), CASES)
def test_under_every_layout(layout: str, world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "BATCH_BYTES", 300)  # bytes: tensors are cut

    def ranks(rank: int) -> tuple[Tensors, Tensors, Tensors]:
        model, optimizer = build(layout, **OPTIONS)
        for step in range(6):
            give_gradients(named_parameters(model), step)
            optimizer.step()
        raw = {name: whole(param) for name, param in named_parameters(model).items()}
        averages = averages_of(optimizer, list(raw))
        export(tmp_path / "raw.safetensors", model)
        with optimizer.averaged_parameters():
            export(tmp_path / "averaged.pt", model)
            export(f"{tmp_path}/averaged", model, max_shard_bytes=2000)
            dense = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            assert rank == 0 or dense == {}
            dense = {name: tensor.clone() for name, tensor in dense.items()}  # they may be the parameters themselves
            dist_asgd.save(tmp_path / "shards", {"model": model})
        assert all(torch.equal(whole(param), raw[name]) for name, param in named_parameters(model).items())
        return raw, averages, dense

    raw, averages, dense = run_ranks(world_size, ranks)[0]
    assert not same(raw, averages) and len(averages) == 16
    assert same(read(tmp_path / "raw.safetensors"), raw)
    assert list(read(tmp_path / "averaged.pt")) == list(raw)
    assert same(read(tmp_path / "averaged.pt"), averages)
    assert same(read(tmp_path / "averaged"), averages) and len(list((tmp_path / "averaged").iterdir())) > 2
    assert same(dense, averages)

    def alone() -> None:
        ours, stock = plain_model(), {"model": plain_model().state_dict()}
        dist_asgd.load(tmp_path / "shards", {"model": ours})
        dcp.load(stock, checkpoint_id=tmp_path / "shards")
        assert same(ours.state_dict(), averages) and same(stock["model"], averages)

    run_alone(alone)


class Awkward(nn.Module):
    """Tied weights, buffers, several dtypes, tensors without elements and without dims, memory in another order."""

    _tied_weights_keys = ("embedding.weight",)

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.low = nn.Linear(6, 6, dtype=torch.bfloat16)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("nothing", torch.empty(0, 3))
        self.register_buffer("mask", torch.arange(5) > 2)
        self.register_buffer("hidden", torch.ones(2), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.low(self.norm(self.embedding(tokens)).bfloat16()).float()
        return self.head(hidden).square().mean() + self.conv(torch.ones(1, 3, 5, 5)).square().mean()


@pytest.mark.parametrize("world_size", [1, 2])
def test_ties_buffers_and_dtypes(world_size: int, tmp_path: Path) -> None:
    def ranks(rank: int) -> tuple[Tensors, Tensors]:
        torch.manual_seed(0)
        model = Awkward()
        optimizer = ShardedASGD(model.named_parameters(), module=model, **OPTIONS)
        for _ in range(5):
            model(torch.arange(8) + rank).backward()
            optimizer.step()
            optimizer.zero_grad()
        export(tmp_path / "raw.pt", model)  # gathers are under way
        raw = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        averages = averages_of(optimizer, [name for name, _ in model.named_parameters()])
        with optimizer.averaged_parameters():
            for name in ("a.pt", "a.safetensors", "a/"):
                export(f"{tmp_path}/{name}", torch.compile(model) if world_size == 2 else model)
        return raw, averages

    raw, averages = run_ranks(world_size, ranks)[0]
    averages["head.weight"] = averages["embedding.weight"]
    expected = {name: averages.get(name, tensor).to(tensor.dtype) for name, tensor in raw.items()}
    assert same(read(tmp_path / "raw.pt"), raw)
    dense = read(tmp_path / "a.pt")
    assert same(dense, expected) and dense["head.weight"].data_ptr() == dense["embedding.weight"].data_ptr()
    del expected["embedding.weight"]  # the model says so
    assert same(read(tmp_path / "a.safetensors"), expected) and same(read(tmp_path / "a"), expected)
    fresh = Awkward()
    assert fresh.load_state_dict(read(tmp_path / "a"), strict=False).missing_keys == ["embedding.weight"]
    assert torch.equal(fresh.embedding.weight, averages["embedding.weight"])


@pytest.mark.parametrize("world_size", [2, 3])
def test_fsdp1(world_size: int, tmp_path: Path) -> None:
    def ranks(rank: int) -> tuple[Tensors, Tensors]:
        model = Model()
        names = [name for name, _ in model.named_parameters()]
        options = {"use_orig_params": True, "device_id": torch.device("cpu")}
        for index, block in enumerate(model.blocks):
            model.blocks[index] = FullyShardedDataParallel(block, **options)
        wrapped = FullyShardedDataParallel(model, **options)
        optimizer = ShardedASGD(wrapped.named_parameters(), module=wrapped, **OPTIONS)
        train(wrapped, optimizer, "fsdp", range(6))
        averages = averages_of(optimizer, names)
        export(tmp_path / "raw.pt", wrapped)
        with optimizer.averaged_parameters():
            export(tmp_path / "averaged.pt", wrapped)
        with FullyShardedDataParallel.summon_full_params(wrapped):
            raw = {name: param.detach().clone() for name, param in zip(names, wrapped.parameters(), strict=True)}
        return raw, averages

    raw, averages = run_ranks(world_size, ranks)[0]
    assert same(read(tmp_path / "raw.pt"), raw) and same(read(tmp_path / "averaged.pt"), averages)


class Config:
    """What configurations of transformers have."""

    def to_json_string(self) -> str:
        return json.dumps({"width": 10, "dtype": "float64"})


def test_the_layout_of_hugging_face(tmp_path: Path) -> None:
    def ranks(rank: int) -> None:
        model = Model()
        model.config = Config()
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        (tmp_path / "several").mkdir(exist_ok=True)
        (tmp_path / "several" / "tokenizer.json").write_text("{}")
        export(tmp_path / "one", model)
        export(tmp_path / "several", model, max_shard_bytes=1000)

    run_ranks(2, ranks)
    model = Model()
    assert {file.name for file in (tmp_path / "one").iterdir()} == {"model.safetensors", "config.json"}
    expected = {"width": 10, "dtype": "float32", "architectures": ["Model"]}
    assert json.loads((tmp_path / "one" / "config.json").read_text()) == expected
    assert same(read(tmp_path / "one"), model.state_dict())
    with safetensors.safe_open(tmp_path / "one" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    state = model.state_dict()
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in state.values())}
    files = sorted(file.name for file in (tmp_path / "several").glob("*.safetensors"))
    assert files == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    for name in files:
        part = safetensors.torch.load_file(tmp_path / "several" / name)
        assert part.keys() == {tensor for tensor, file in index["weight_map"].items() if file == name}
        assert same(part, {tensor: state[tensor] for tensor in part})
        assert sum(tensor.nbytes for tensor in part.values()) <= 1000 or len(part) == 1
    order = list(dict.fromkeys(index["weight_map"][name] for name in state))
    assert order == files and index["weight_map"].keys() == state.keys()


def test_stages_of_a_pipeline(tmp_path: Path) -> None:
    """Each rank has modules of its own, and rank 0's count where several have one."""

    def ranks(rank: int) -> Tensors:
        torch.manual_seed(rank)
        model = nn.ModuleDict({f"stage{rank}": nn.Linear(3, 4), "norm": nn.LayerNorm(3)})
        nn.init.constant_(model["norm"].weight, rank)
        export(tmp_path / "all.pt", model)
        return dict(model.state_dict())

    first, second = run_ranks(2, ranks)
    assert list(read(tmp_path / "all.pt")) == [*first, "stage1.weight", "stage1.bias"]
    assert same(read(tmp_path / "all.pt"), {**second, **first})


def test_on_stores(s3_server: Any) -> None:
    url = s3_server.new_url()

    def ranks(rank: int) -> None:
        model, _ = build("fsdp", **OPTIONS)
        export(url, model, s3_server.options, max_shard_bytes=1000)
        export(f"{url}/sub/x.safetensors", model, s3_server.options)
        export("memory://exports/x.pt", model)
        if rank == 0:
            with fsspec.open("memory://exports/x.pt") as file:
                assert same(torch.load(file, weights_only=True), Model().state_dict())
        text = message_of(lambda: export(url, model, s3_server.options), CheckpointError)
        assert "has weights already: model-00001-of-" in text and s3_server.options["secret"] not in text

    run_ranks(2, ranks)
    storage = Storage.open(url, s3_server.options)
    index = json.loads(storage.read("model.safetensors.index.json"))
    found: Tensors = {}
    for name in set(index["weight_map"].values()):
        found |= safetensors.torch.load(storage.read(name))
    assert same(found, Model().state_dict())
    assert same(safetensors.torch.load(storage.read("sub/x.safetensors")), Model().state_dict())


# What goes wrong


LIMIT = 300_000  # bytes of a file; the harness has its store in one


@pytest.mark.parametrize("out", ["x.pt", "x.safetensors", "x/y"])
def test_a_full_disk(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank says so, training goes on, and nothing is left that is not whole."""
    monkeypatch.setattr(gather, "BATCH_BYTES", 50_000)
    (tmp_path / "x.pt").write_text("older")

    def ranks(rank: int) -> str:
        model = nn.Sequential(nn.Linear(300, 10), nn.Linear(10, 300), nn.Linear(300, 300))
        for layer in model:
            fully_shard(layer)
        optimizer = ShardedASGD(model.named_parameters(), module=fully_shard(model), **OPTIONS)
        step(model, optimizer, 4)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        with optimizer.averaged_parameters():
            if rank == 0:
                resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, limits[1]))  # not met by the first of several files
            text = message_of(lambda: export(tmp_path / out, model, max_shard_bytes=LIMIT // 2), CheckpointError)
            if rank == 0:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        step(model, optimizer, 2)
        export(tmp_path / "good.pt", model)
        return text

    texts = run_ranks(3, ranks)
    assert len(set(texts)) == 1 and "rank 0" in texts[0] and "File too large" in texts[0], texts
    files = {file.name for file in tmp_path.rglob("*") if file.is_file()}
    assert files == {"x.pt", "good.pt"} and (tmp_path / "x.pt").read_text() == "older"


def step(model: nn.Module, optimizer: ShardedASGD, count: int) -> None:
    for _ in range(count):
        model(torch.ones(1, 300)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def wrong_dtype(rank: int, model: nn.Module, folder: Path) -> None:
    model.register_buffer("wide", torch.ones(2, dtype=torch.complex128))
    export(folder / "x", model)


def wrong_size(rank: int, model: nn.Module, folder: Path) -> None:
    export(folder / "x", model, max_shard_bytes=1000 * (rank != 1))


def other_shapes(rank: int, model: nn.Module, folder: Path) -> None:
    model.register_buffer("own", torch.ones(rank + 1))
    export(folder / "x.pt", model)


def twice(rank: int, model: nn.Module, folder: Path) -> None:
    export(folder / "twice", model)
    export(folder / "twice", model, max_shard_bytes=1000)


WRONG = {
    wrong_dtype: "'wide' is complex128, which safetensors cannot hold",
    wrong_size: "rank 1: max_shard_bytes must be a whole number of at least 1, got 0",
    other_shapes: "ranks have different tensors as 'own'",
    twice: "has weights already: model.safetensors",
    lambda rank, model, folder: export(folder / "x.pt", model.state_dict()): "model must be a torch.nn.Module",
    lambda rank, model, folder: export("ftp2://x/y.pt", model): "ftp2",
    lambda rank, model, folder: export("memory://x.pt", model): "names no file in a folder",
    lambda rank, model, folder: export(Path(__file__) / "x.pt", model): "Not a directory",
    lambda rank, model, folder: export(Path(__file__), model): "Not a directory",
    lambda rank, model, folder: export("", model): "expected a URL or a path",
}


@pytest.mark.parametrize("act", WRONG)
def test_errors_are_the_same_on_every_rank(act: Any, tmp_path: Path) -> None:
    def ranks(rank: int) -> str:
        model, _ = build("fsdp", **OPTIONS)
        return message_of(lambda: act(rank, model, tmp_path), CheckpointError, ValueError, TypeError)

    texts = run_ranks(2, ranks)
    assert texts[0] == texts[1] and WRONG[act] in texts[0]
    assert {path.name for path in tmp_path.iterdir()} <= {"twice"}


def test_a_rank_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "BATCH_BYTES", 8)

    def ranks(rank: int) -> None:
        model = fully_shard(nn.Linear(1000, 300))
        if rank == 1:
            threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        started = time.monotonic()
        text = message_of(lambda: export(tmp_path / "x.pt", model), CheckpointError)
        (tmp_path / f"{rank}.txt").write_text(f"{time.monotonic() - started} {text}")

    with pytest.raises(RankError):
        run_ranks(3, ranks)
    assert {file.name for file in tmp_path.iterdir()} == {"0.txt", "2.txt"}


def test_a_rank_that_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "BATCH_BYTES", 8)

    def ranks(rank: int) -> str:
        model = fully_shard(nn.Linear(1000, 300))
        if rank == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let what runs in the background ignore it
            parts, memory = itertools.count(), gather.memory

            def interrupted(part: torch.Tensor) -> memoryview:
                if next(parts) == 1000:
                    signal.raise_signal(signal.SIGINT)
                return memory(part)

            gather.memory = interrupted
        return message_of(lambda: export(tmp_path / "x.pt", model), CheckpointError, KeyboardInterrupt)

    mine, others = run_ranks(2, ranks)
    assert mine == "KeyboardInterrupt: " and others.startswith("CheckpointError: ")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_tensor_is_left_out_aloud(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"scale": 3}

    def alone() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            export(tmp_path / "x.pt", nn.Sequential(Extra(2, 3)))
        (warning,) = caught
        assert "0._extra_state" in str(warning.message) and warning.filename == __file__

    run_alone(alone)
    assert list(read(tmp_path / "x.pt")) == ["0.weight", "0.bias"]


# Memory


@pytest.mark.parametrize("out", ["x.pt", "x.safetensors", "x"])
def test_no_rank_has_a_whole_copy_nor_a_whole_tensor(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, megabyte = 2**20, 2**20
    monkeypatch.setattr(gather, "BATCH_BYTES", batch)

    def ranks(rank: int) -> int:
        map_large_blocks()
        model = nn.Sequential(*(nn.Linear(4096, 3072, bias=False) for _ in range(3)))  # 3 x 48 MiB
        fully_shard(model)
        export(tmp_path / "warm.pt", nn.Linear(800, 800))
        start = reset_peak()
        export(tmp_path / out, model)
        return peak_resident() - start

    for growth in run_ranks(2, ranks):
        # Parts and what is received for them; the rest is Python's, gloo's, and code that was never run before.
        assert growth < 6 * batch + 26 * megabyte
