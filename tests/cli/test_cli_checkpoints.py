"""dist-asgd ls, show, verify, export and gc, on checkpoints that three ranks saved and on stock ones."""

import contextlib
import io
import itertools
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from fsspec.implementations.memory import MemoryFileSystem
from torch import nn

from dist_asgd import Checkpointer, ShardedASGD, load, save
from dist_asgd.checkpoint import CheckpointError
from dist_asgd.checkpoint.export import from_checkpoint
from dist_asgd.checkpoint.format import torch_archive
from dist_asgd.checkpoint.format.entries import SavedTensor
from dist_asgd.checkpoint.format.manifest import FileRecord, read_manifest, write_manifest
from dist_asgd.checkpoint.loading import verify
from dist_asgd.checkpoint.stock.metadata import read_stock_metadata
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.cli.main import main
from tests.support.format_reader import read_checkpoint
from tests.support.ranks import message_of, run_alone, run_ranks
from tests.support.stores import *  # noqa: F403 fixtures

AWKWARD = {"pair": (1, float("inf")), "bytes": b"\x00\xff", "large": 2**70, "named": {3: "three"}, "none": None}


class Model(nn.Module):
    """Tied weights, buffers, two dtypes, and a tensor that ranks write parts of."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(50, 8)
        self.register_buffer("scale", torch.linspace(0.1, 1, 8))
        self.wide = nn.Linear(600, 700)
        self.low = nn.Linear(8, 8, dtype=torch.bfloat16)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens):
        hidden = self.low((self.scale * self.wte(tokens)).bfloat16()).float()
        return self.head(hidden).square().mean() + self.wide(torch.ones(4, 600) / 30).square().mean()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns (directory of a run with steps 5 and 10, model's state at step 10, averages at step 10 by name)."""
    folder = tmp_path_factory.mktemp("cli") / "run"

    def ranks(rank):
        torch.manual_seed(0)
        model = Model()
        optimizer = ShardedASGD(model.named_parameters(), lr=0.05, t0=1)
        with Checkpointer(folder) as checkpointer:
            for step in range(1, 11):
                optimizer.zero_grad()
                model(torch.arange(10) + 7 * rank).backward()
                optimizer.step()
                if step % 5 == 0:
                    mine = torch.full((3,), float(rank))
                    data = {"mine": mine, "rank": rank, "same": "everywhere", **AWKWARD}
                    checkpointer.save(step, {"model": model, "optimizer": optimizer, "data": data})
        full = optimizer.full_state_dict().get("state", {})  # of rank 0
        names = [name for name, _ in model.named_parameters()]
        return model.state_dict(), {names[index]: entry["ax"] for index, entry in full.items()}

    return folder, *run_ranks(3, ranks)[0]


@pytest.fixture
def run(saved, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(saved[0], tmp_path / "run")


def called(capsys, *arguments):
    """Runs a command. Returns (exit status, standard output, standard error)."""
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and (status == 0 or captured.err.count("\n") <= 1)
    return status, captured.out, captured.err


def answer(capsys, *arguments, status=0):
    found, out, _ = called(capsys, *arguments, "--json")
    assert found == status
    return json.loads(out)


def directories(run):
    return sorted(run.glob("step-*"))


def newest(run):
    return directories(run)[-1]


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 0x10
    file.write_bytes(data)


def test_a_reader_of_its_own_by_the_documentation(saved):
    folder, model, averages = saved
    for rank in range(3):
        state = read_checkpoint(newest(folder), rank)
        for name, tensor in model.items():
            assert state[f"model.{name}"].dtype == tensor.dtype and torch.equal(state[f"model.{name}"], tensor)
        for name, average in averages.items():
            assert torch.equal(state[f"optimizer.state.{name}.ax"], average)
        assert state["data.mine"].tolist() == [rank] * 3 and state["data.rank"] == rank
        assert {name: state[f"data.{name}"] for name in AWKWARD} == AWKWARD
        assert state["data.same"] == "everywhere" and state["optimizer.param_groups.0.lr"] == 0.05


def test_ls(run, capsys):
    first = directories(run)[0]
    shutil.copytree(first, run / "step-00000005-0002-0000abcd")
    incomplete = shutil.copytree(first, run / "step-00000007-0001-0000abcd")
    (incomplete / "manifest.json").unlink()
    found = answer(capsys, "ls", run)["checkpoints"]
    assert [(row["step"], row["state"], row["world_size"]) for row in found] == [
        (5, "replaced", 3),
        (5, "committed", 3),
        (7, "incomplete", None),
        (10, "committed", 3),
    ]
    assert found[-1]["bytes"] == sum(file.stat().st_size for file in newest(run).iterdir())
    _, out, _ = called(capsys, "ls", run)
    assert out.splitlines()[-1].split()[0] == "10" and out.splitlines()[-1].endswith(newest(run).name)
    (newest(run) / "__1_0.distcp").unlink()
    assert answer(capsys, "ls", run, status=1)["checkpoints"][-1]["damage"].startswith("__1_0.distcp")


def test_ls_shows_what_is_abandoned(saved, run, capsys):
    with Checkpointer(run) as checkpointer:
        checkpointer.load({}, step=5, strict=False)
        checkpointer.save(6, {})
    states = [(row["step"], row["state"]) for row in answer(capsys, "ls", run)["checkpoints"]]
    assert states == [(5, "committed"), (6, "committed"), (10, "abandoned")]
    assert answer(capsys, "show", run)["step"] == 6 and answer(capsys, "show", run, "--step", 10)["step"] == 10
    deleted = answer(capsys, "gc", run, "--keep-last", 2)["deleted"]
    assert list(deleted) == [newest(saved[0]).name]


def test_ls_verifies_if_asked(run, capsys):
    flip(newest(run) / "__1_0.distcp", 1000)
    assert answer(capsys, "ls", run)["checkpoints"][-1]["state"] == "committed"
    first, second = answer(capsys, "ls", run, "--verify", status=1)["checkpoints"]
    assert first["state"] == "committed" and second["state"] == "damaged"
    assert second["damage"].startswith("__1_0.distcp: bytes ")


def test_ls_shows_one_checkpoint(run, tmp_path, capsys):
    (row,) = answer(capsys, "ls", newest(run), "--verify")["checkpoints"]
    assert (row["step"], row["state"], row["world_size"], row["damage"]) == (10, "committed", 3, None)
    dcp.save({"x": torch.ones(4), "n": {"a": 7}}, checkpoint_id=tmp_path / "stock", no_dist=True)
    for more in ([], ["--verify"]):
        (row,) = answer(capsys, "ls", tmp_path / "stock", *more)["checkpoints"]
        assert (row["step"], row["state"], row["tensors"]) == (None, "torch.distributed.checkpoint", 1)
    assert "torch.distributed.checkpoint" in called(capsys, "ls", tmp_path / "stock")[1]
    (newest(run) / "manifest.json").write_text("")
    assert "is empty" in answer(capsys, "ls", newest(run), status=1)["checkpoints"][0]["damage"]
    (newest(run) / "manifest.json").unlink()
    status, _, err = called(capsys, "ls", newest(run))
    assert status == 3 and "has no manifest.json" in err


def test_show(saved, capsys):
    folder, model, _ = saved
    found = answer(capsys, "show", folder, "--step", 5)
    assert (found["step"], found["world_size"], found["format"]) == (5, 3, "dist_asgd")
    assert {key for key in found["tensors"] if key.startswith("model.")} == {f"model.{name}" for name in model}
    wide = found["tensors"]["model.wide.weight"]
    assert (wide["dtype"], wide["shape"], wide["bytes"]) == ("float32", [700, 600], 4 * 700 * 600)
    assert len({chunk["file"] for chunk in wide["chunks"]}) > 1
    _, out, _ = called(capsys, "show", newest(folder), "--keys", "data.*")
    assert "data.mine@rank2" in out and "'everywhere'" in out and "model." not in out and "step      10" in out


def test_show_of_one_average(saved, tmp_path, capsys):
    folder, _, averages = saved
    expected = {f"optimizer.state.{name}.ax" for name in averages}
    for arguments in ([], ["average"]):
        found = answer(capsys, "show", folder, "--average", *arguments)
        assert found["averages"] == ["average"] and found["tensors"].keys() == expected and not found["values"]
    assert "averages  average" in called(capsys, "show", folder)[1]
    found = answer(capsys, "show", folder, "--average", "--keys", "*.low.weight.ax")
    assert found["tensors"].keys() == {"optimizer.state.low.weight.ax"}
    save(tmp_path / "plain", {"model": {"w": torch.ones(2)}})
    status, _, err = called(capsys, "show", tmp_path / "plain", "--average")
    assert status == 1 and "has no averages" in err


def test_verify_reads_every_byte(run, capsys):
    """A changed byte is found wherever it is. Its file is named, and no other file."""
    folder = newest(run)
    status, out, _ = called(capsys, "verify", run)
    assert status == 0 and "as they were saved" in out
    stock = read_stock_metadata((folder / ".metadata").read_bytes(), committed=True)
    manifest = read_manifest((folder / "manifest.json").read_bytes())
    edges = [
        (folder / item.file, at)
        for item in manifest.items[::9]
        for at in (item.offset, item.start - 1, item.start, item.start + item.size - 1, item.stop - 1)
    ]
    generator = random.Random(0)
    anywhere = [(file, generator.randrange(file.stat().st_size)) for file in sorted(folder.iterdir()) for _ in range(8)]
    for file, at in [*edges, *anywhere]:
        flip(file, at)
        assert {fault["file"] for fault in answer(capsys, "verify", folder, status=1)["faults"]} == {file.name}, at
        flip(file, at)
    value = stock.objects["data.same"]
    flip(folder / value.path, (folder / value.path).read_bytes().index(b"everywhere", value.offset))
    assert len(answer(capsys, "verify", folder, status=1)["faults"]) == 1


def test_verify_takes_any_names(tmp_path, capsys):
    names = ["a/b", "..", "\0", "\ud800", "", "#dict", "x@rank0", "\u202e"]
    save(tmp_path / "saved", {"data": {name: torch.ones(2) for name in names}})
    assert answer(capsys, "verify", tmp_path / "saved")["faults"] == []
    state = {"data": {name: torch.zeros(2) for name in names}}
    load(tmp_path / "saved", state)
    assert all(value.tolist() == [1, 1] for value in state["data"].values())


def test_verify_tells_all_that_is_wrong(run, capsys):
    folder = newest(run)
    manifest = read_manifest((folder / "manifest.json").read_bytes())
    item = manifest.items[manifest.tensors["model.wide.weight"].chunks[0].item]
    file = folder / item.file
    data = bytearray(file.read_bytes())
    data[item.start + item.block : item.start + 3 * item.block] = bytes(2 * item.block)
    file.write_bytes(data)
    (folder / "__2_0.distcp").unlink()
    (folder / "notes.txt").write_text("mine")
    faults = answer(capsys, "verify", folder, status=1)["faults"]
    assert [(fault["file"], fault["key"]) for fault in faults] == [
        (item.file, "model.wide.weight"),
        ("__2_0.distcp", ""),
        ("notes.txt", ""),
    ]
    assert f"bytes {item.start + item.block} to {item.start + 3 * item.block} " in faults[0]["text"]
    with (folder / "__2_0.distcp").open("wb") as short:
        short.write(b"PK")
    _, out, err = called(capsys, "verify", folder)
    assert "__2_0.distcp: the file has 2 bytes" in out and "3 faults" in err


def test_verify_compares_what_files_and_manifest_say(run, capsys):
    folder = newest(run)
    manifest = read_manifest((folder / "manifest.json").read_bytes())
    with (folder / "__1_0.distcp").open("ab") as file:
        file.write(b"more")
    size = manifest.files["__1_0.distcp"].size
    tensor = manifest.tensors["model.scale"]
    changed = replace(
        manifest,
        files={**manifest.files, "__1_0.distcp": FileRecord(size + 4)},
        tensors={**manifest.tensors, "model.scale": replace(tensor, saved=SavedTensor((8,), torch.int32))},
    )
    (folder / "manifest.json").write_bytes(write_manifest(changed))
    stock, loose = answer(capsys, "verify", folder, status=1)["faults"]
    assert (stock["file"], stock["key"]) == (".metadata", "model.scale")
    assert (loose["file"], loose["text"]) == ("__1_0.distcp", f"bytes {size} to {size + 4} belong to nothing")


@pytest.mark.parametrize("piece", [verify.READ_BYTES, 1000])  # 1000: archives are large, and streamed
def test_verify_a_stock_checkpoint(tmp_path, capsys, monkeypatch, piece):
    monkeypatch.setattr(verify, "READ_BYTES", piece)
    state = {"model": nn.Linear(50, 60).state_dict(), "half": torch.ones(3000, dtype=torch.bfloat16), "n": {"a": 7}}
    dcp.save(state, checkpoint_id=tmp_path)
    status, out, _ = called(capsys, "verify", tmp_path)
    assert status == 0 and "torch.distributed.checkpoint" in out
    assert answer(capsys, "show", tmp_path)["tensors"]["model.weight"]["shape"] == [60, 50]
    file = tmp_path / "__0_0.distcp"
    flip(file, file.read_bytes().index(state["model"]["weight"].numpy().tobytes()) + 5000)
    (fault,) = answer(capsys, "verify", tmp_path, status=1)["faults"]
    assert (fault["file"], fault["key"]) == (file.name, "model.weight") and "CRC" in fault["text"]
    file.write_bytes(file.read_bytes()[:9000])
    assert "bytes, and" in answer(capsys, "verify", tmp_path, status=1)["faults"][0]["text"]
    assert called(capsys, "export", tmp_path, tmp_path / "out.pt")[0] == 1


def loaded(file):
    if file.suffix == ".safetensors":
        return safetensors.torch.load_file(file)
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
    state, mapped = (torch.load(file, weights_only=True, mmap=mmap) for mmap in (False, True))
    assert all(torch.equal(state[name], mapped[name]) for name in state) and type(state) is dict
    return state


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_export_of_a_stock_checkpoint(tmp_path, capsys, suffix):
    tied, other = torch.randn(50, 8), torch.randn(50, 8)
    average, model = tied + 1, {"wte.weight": tied, "head.weight": tied.clone(), "other": other, "conv": other.mT}
    state = {"model": model, "optimizer": {"state": {"wte.weight": {"ax": average}}}, "n": {"a": 7}}
    dcp.save(state, checkpoint_id=tmp_path / "saved")
    out = tmp_path / f"out{suffix}"
    assert answer(capsys, "export", tmp_path / "saved", out)["step"] is None
    assert {name: tensor.tolist() for name, tensor in loaded(out).items()} == {k: v.tolist() for k, v in model.items()}
    found = answer(capsys, "export", tmp_path / "saved", out, "--average")
    assert found["not_averaged"] == ["other", "conv"]
    assert torch.equal(loaded(out)["wte.weight"], average) and torch.equal(loaded(out)["head.weight"], average)
    shown = answer(capsys, "show", tmp_path / "saved", "--average")
    assert [*shown["tensors"]] == ["optimizer.state.wte.weight.ax"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("batch", "long"), [(from_checkpoint.BATCH_BYTES, torch_archive.LONG), (40_000, 30_000)]
)  # small: zip64, pieces
def test_export(saved, tmp_path, capsys, monkeypatch, suffix, batch, long):
    monkeypatch.setattr(from_checkpoint, "BATCH_BYTES", batch)
    monkeypatch.setattr(torch_archive, "LONG", long)
    folder, model, averages = saved
    assert called(capsys, "export", folder, tmp_path / f"raw{suffix}")[0] == 0
    raw = loaded(tmp_path / f"raw{suffix}")
    assert raw.keys() == model.keys() and all(torch.equal(raw[name], model[name]) for name in model)
    assert all(raw[name].dtype == model[name].dtype for name in model)
    Model().load_state_dict(raw)
    done = answer(capsys, "export", folder, tmp_path / f"averaged{suffix}", "--average")
    found = loaded(tmp_path / f"averaged{suffix}")
    averages = {**averages, "head.weight": averages["wte.weight"]}
    for name in model:
        expected = averages[name].to(model[name].dtype) if name in averages else model[name]
        assert found[name].dtype == model[name].dtype and torch.equal(found[name], expected), name
    assert averages["low.weight"].dtype == torch.float32 and not torch.equal(found["wte.weight"], model["wte.weight"])
    assert set(done["not_averaged"]) == model.keys() - averages.keys()
    assert done["bytes"] == (tmp_path / f"averaged{suffix}").stat().st_size


def test_export_of_other_entries_and_to_a_store(saved, tmp_path, capsys):
    folder = saved[0]
    assert called(capsys, "export", folder, tmp_path / "x.pt", "--keys", "optimizer.state.*.ax")[0] == 0
    assert "optimizer.state.low.bias.ax" in loaded(tmp_path / "x.pt")
    assert called(capsys, "export", folder, tmp_path / "y", "--format", "torch", "--entry", "data")[0] == 0
    assert loaded(tmp_path / "y")["mine@rank2"].tolist() == [2, 2, 2]
    assert called(capsys, "export", folder, "memory://exports/z.safetensors", "--step", 5)[0] == 0
    data = MemoryFileSystem().cat_file("/exports/z.safetensors")
    assert safetensors.torch.load(data)["low.bias"].dtype == torch.bfloat16
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header.pop("__metadata__") == {"format": "pt"}
    MemoryFileSystem().rm("/exports", recursive=True)


def test_elements_are_aligned(tmp_path, capsys, monkeypatch):
    """Elements of safetensors begin on multiples of their size, those of torch.save on 64 bytes, in zip64 form too."""
    state = {
        "a": torch.ones(3, dtype=torch.bfloat16),
        "b": torch.ones(1, dtype=torch.bool),
        "c": torch.ones(5).double(),
    }
    save(tmp_path / "saved", {"model": state})
    assert called(capsys, "export", tmp_path / "saved", tmp_path / "x.safetensors")[0] == 0
    data = (tmp_path / "x.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    assert start % 8 == 0
    for name, tensor in state.items():
        assert (start + header[name]["data_offsets"][0]) % tensor.element_size() == 0
    for long in (torch_archive.LONG, 5):
        monkeypatch.setattr(torch_archive, "LONG", long)
        assert called(capsys, "export", tmp_path / "saved", tmp_path / "x.pt")[0] == 0
        data = (tmp_path / "x.pt").read_bytes()
        for entry in zipfile.ZipFile(tmp_path / "x.pt").infolist()[3:]:
            start = entry.header_offset + 30 + sum(struct.unpack_from("<2H", data, entry.header_offset + 26))
            assert start % 64 == 0
            sizes = (entry.file_size,) * 2
            descriptor = struct.pack("<L2Q" if entry.file_size >= long else "<3L", entry.CRC, *sizes)
            assert data[start + entry.file_size :].startswith(b"PK\x07\x08" + descriptor + b"PK")


@pytest.mark.parametrize("out", ["hf/", "hf"])
def test_export_to_a_directory_for_transformers(saved, tmp_path, capsys, out):
    folder, model, averages = saved
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    options = ["--format", "huggingface", "--config", tmp_path / "config.json", "--max-shard-size", "1KiB"]
    _, _, err = called(capsys, "export", folder, f"{tmp_path}/one/", "--average")
    assert "no config.json" in err and {file.name for file in (tmp_path / "one").iterdir()} == {"model.safetensors"}
    done = answer(capsys, "export", folder, f"{tmp_path}/{out}", "--average", *options)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    names = {f"model-{n:05}-of-00005.safetensors" for n in range(1, 6)}
    assert set(index["weight_map"].values()) == names and index["weight_map"].keys() == model.keys()
    files = {file.name: file.stat().st_size for file in (tmp_path / "hf").iterdir()}
    assert files.keys() == {*names, "config.json", "model.safetensors.index.json"}
    assert sum(files.values()) == done["bytes"] and done["out"] == f"{tmp_path}/hf/"
    assert (tmp_path / "hf" / "config.json").read_text() == '{"model_type": "gpt2"}'
    averages = {**averages, "head.weight": averages["wte.weight"]}
    for name, tensor in model.items():
        found = loaded(tmp_path / "hf" / index["weight_map"][name])[name]
        assert found.dtype == tensor.dtype and torch.equal(found, averages.get(name, tensor).to(tensor.dtype))
    assert loaded(tmp_path / "one" / "model.safetensors").keys() == model.keys()
    status, _, err = called(capsys, "export", folder, f"{tmp_path}/{out}", *options)
    assert status == 1 and "has weights already" in err


def test_export_of_one_of_several_averages(tmp_path, capsys):
    def averages(number):
        return {"ax": torch.full((2,), number), "ax_ema": torch.full((2,), number + 1)}

    groups = [{"average": "mean=Uniform(every=1), ema=EMA(every=1, decay=0.9, warmup=True)"}]
    optimizer = {"state": {"w": averages(5.0), "v": averages(7.0)}, "param_groups": groups}
    save(tmp_path / "saved", {"model": {"w": torch.ones(2), "v": torch.ones(2)}, "optimizer": optimizer})
    for name, number in ((None, 5.0), ("mean", 5.0), ("ema", 6.0)):
        assert (
            called(capsys, "export", tmp_path / "saved", tmp_path / "x.pt", "--average", *filter(None, [name]))[0] == 0
        )
        assert {key: value[0].item() for key, value in loaded(tmp_path / "x.pt").items()} == {
            "w": number,
            "v": number + 2,
        }
        key = "ax_ema" if name == "ema" else "ax"
        shown = answer(capsys, "show", tmp_path / "saved", "--average", *filter(None, [name]))
        assert shown["tensors"].keys() == {f"optimizer.state.w.{key}", f"optimizer.state.v.{key}"}
        assert shown["averages"] == ["mean", "ema"]
    status, _, err = called(capsys, "export", tmp_path / "saved", tmp_path / "y.pt", "--average", "other")
    assert status == 1 and "has no average 'other', it has ['mean', 'ema']" in err


def test_merge(saved, tmp_path, capsys):
    folder, _, averages = saved
    done = answer(capsys, "merge", folder, tmp_path / "out", "--steps", "5:10:5", "--weights", "1,3")
    assert list(done["weights"].values()) == [0.25, 0.75] and done["step"] == 10 and done["format"] == "checkpoint"
    assert (
        answer(capsys, "show", tmp_path / "out")["step"] == 10
        and answer(capsys, "verify", tmp_path / "out")["faults"] == []
    )
    status, out, err = called(capsys, "merge", folder, f"{tmp_path}/hf/", "--average")
    assert status == 0 and "sources: 1 up to step 10" in out and "not averages, as they have none: scale" in err
    found = loaded(tmp_path / "hf" / "model.safetensors")
    averages = {**averages, "head.weight": averages["wte.weight"]}
    assert all(torch.equal(found[name], averages[name].to(found[name].dtype)) for name in averages)
    for arguments, code, text in (
        (["--steps", "5:10", "--weights", "1"], 2, "1 weights are given for 2 checkpoints"),
        (["--steps", "5:15:5"], 1, "no checkpoint of step 15"),
        (["--ema-width", "0.1"], 1, "of the kind PolynomialDecay"),
        (["--ema-width", "3"], 2, "ema_width must be in"),
    ):
        status, _, err = called(capsys, "merge", folder, tmp_path / "x", *arguments)
        assert status == code and text in err and not (tmp_path / "x").exists()
    with pytest.raises(SystemExit):
        main(["merge", "run", "x", "--weights", "1,x"])
    assert "are no weights" in capsys.readouterr().err


def test_sizes_are_read(tmp_path, capsys):
    model = {"a": torch.zeros(1000, dtype=torch.uint8), "b": torch.zeros(24, dtype=torch.uint8)}
    save(tmp_path / "saved", {"model": model})
    for text, files in (("1KB", 3), ("1023", 3), ("1024", 1), ("1KiB", 1), ("1MB", 1), ("5TiB", 1)):  # 3: with an index
        assert called(capsys, "export", tmp_path / "saved", f"{tmp_path}/{text}/", "--max-shard-size", text)[0] == 0
        assert len(list((tmp_path / text).iterdir())) == files, text
    for text in ("", "0", "-1", "5gb", "5 GB", "GB", "5B", "1.5GB", "٣GB"):
        with pytest.raises(SystemExit):
            main(["export", "run", "out/", f"--max-shard-size={text}"])
        assert "is no size" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", "/"])
def test_damage_leaves_no_file(run, tmp_path, capsys, suffix):
    manifest = read_manifest((newest(run) / "manifest.json").read_bytes())
    item = manifest.items[manifest.tensors["model.wte.weight"].chunks[-1].item]
    flip(newest(run) / item.file, item.start + item.size // 2)
    out = f"{tmp_path}/out{suffix}"
    status, _, err = called(capsys, "export", run, out)
    assert status == 1 and "model.wte.weight" in err and "damaged" in err
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and run not in file.parents]
    assert called(capsys, "export", run, out, "--keys", "model.low.*")[0] == 0  # does not read it


def test_gc(run, capsys):
    for number, step in itertools.product((2, 3), (5, 10)):
        shutil.copytree(directories(run)[0], run / f"step-{step:08d}-{number:04d}-0000abcd")
    incomplete = shutil.copytree(newest(run), run / "step-00000012-0001-0000abcd")
    (incomplete / "manifest.json").unlink()
    before = [folder.name for folder in directories(run)]
    would = answer(capsys, "gc", run, "--keep-last", 1, "--older-than", 0, "--dry-run")["deleted"]
    assert [folder.name for folder in directories(run)] == before
    assert before[3:] == [name for name in before if "-00000010-" in name or "-00000012-" in name]
    assert set(would) == set(before) - {"step-00000010-0003-0000abcd"}
    assert answer(capsys, "gc", run)["deleted"].keys() == {
        name for name in before if name[14:18] in ("0001", "0002")
    } - {"step-00000012-0001-0000abcd"}
    assert called(capsys, "gc", run, "--keep-last", 1, "--pin", 5)[1].startswith("deleted 0 directories")
    assert called(capsys, "gc", run, "--keep-last", 1, "--keep-every", 10)[0] == 0
    assert [folder.name for folder in directories(run)] == ["step-00000010-0003-0000abcd", incomplete.name]


@pytest.mark.parametrize("command", ["ls", "show", "verify", "gc", "export", "merge"])
def test_where_there_is_no_checkpoint(tmp_path, capsys, command):
    arguments = [command, tmp_path, *(["out.pt"] if command in ("export", "merge") else [])]
    status, out, err = called(capsys, *arguments)
    assert status == 3 and not out and str(tmp_path) in err
    assert called(capsys, command, tmp_path / "nothing", *arguments[2:])[0] == 3


@pytest.mark.parametrize("command", ["show", "verify", "export"])
def test_what_was_not_committed_is_no_checkpoint(run, tmp_path, capsys, command):
    """A directory without manifest.json is none, although stock readers would take it."""
    (newest(run) / "manifest.json").rename(newest(run) / "manifest.json.old")
    out = [tmp_path / "out.pt"] if command == "export" else []
    status, text, err = called(capsys, command, newest(run), *out)
    assert status == 3 and not text and "has no manifest.json" in err and list(tmp_path.iterdir()) == [run]
    assert called(capsys, command, run, *out, "--step", 5)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "{run}", "--step", "7"], "has no checkpoint of step 7; it has [5, 10]"),
        (["show", "{newest}", "--step", "5"], "is one checkpoint"),
        (["show", "{run}", "--average", "ema"], "has no average 'ema', it has ['average']"),
        (["export", "{run}", "out"], "say --format"),
        (["export", "{run}", "out.pt", "--max-shard-size", "5GB"], "are for --format huggingface"),
        (["export", "{run}", "out/", "--config", "{run}/none.json"], "cannot read"),
        (["export", "{run}", "out/", "--average", "ema"], "has no average 'ema', it has ['average']"),
        (["export", "{run}", "out.pt", "--entry", "nothing"], "it has ['data', 'model', 'optimizer']"),
        (["export", "{run}", "out.pt", "--entry", "data", "--average"], "no averages"),
        (["gc", "{run}", "--pin", "5"], "--keep-last"),
        (["ls", "s3:/bucket/run"], "no local path and no URL"),
        (["ls", "{run}", "--storage-options", "{run}/none.json"], "cannot read"),
    ],
)
def test_errors_are_a_line(saved, capsys, arguments, message):
    places = {"run": saved[0], "newest": newest(saved[0])}
    status, _, err = called(capsys, *(argument.format(**places) for argument in arguments))
    assert status in (1, 2, 3) and message in err


def test_secrets_are_not_told(tmp_path, capsys):
    secrets = tmp_path / "options.json"
    secrets.write_text('{"password": "sesame-1", "token": "sesame-2"')
    for arguments in (
        ["ls", "memory://x", "--storage-options", secrets],
        ["ls", tmp_path, "--storage-option", "key=sesame-3"],
        ["ls", "nonsense://user:sesame-4@host/x"],
        ["verify", "memory://user:sesame-5@x/y"],
    ):
        status, out, err = called(capsys, *arguments)
        assert status in (1, 2, 3) and "sesame" not in out + err
    with pytest.raises(SystemExit) as caught:
        main(["ls", "memory://x", "--storage-option", "sesame-6"])
    assert caught.value.code == 2 and "sesame" not in capsys.readouterr().err


def test_names_and_values_cannot_write_to_the_terminal(tmp_path, capsys):
    evil = "\x1b]0;owned\x07\n\u202e\ud800"
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"data": {f"t{evil}": torch.ones(2), "v": evil}})
    flip(newest(tmp_path) / "__0_0.distcp", 100)
    for command in ("show", "verify"):
        _, out, err = called(capsys, command, tmp_path)
        assert r"\x1b]0;owned\x07" in out and not {"\x1b", "\x07", "\u202e"} & set(out + err)


def test_a_bar_at_a_terminal_only(saved, capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    folder = saved[0]
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main(["verify", str(folder)]) == 0
    assert "verified" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main(["verify", str(folder), "--json"]) == 0 and sys.stderr.getvalue() == ""


def test_on_a_store(s3_server, saved, tmp_path, capsys):
    options = tmp_path / "options.json"
    options.write_text(json.dumps(s3_server.options))
    url, out = s3_server.new_url(), f"{s3_server.root}/exports/model.safetensors"
    with Checkpointer(url, s3_server.options) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"model": saved[1]})
    common = ["--storage-options", options]
    assert [row["step"] for row in answer(capsys, "ls", url, *common)["checkpoints"]] == [1, 2]
    assert called(capsys, "verify", url, *common)[0] == 0
    assert answer(capsys, "export", url, out, *common)["out"] == out
    assert called(capsys, "export", url, tmp_path / "here.pt", *common)[0] == 0
    assert called(capsys, "export", saved[0], f"{s3_server.root}/exports/there.pt", *common)[0] == 0
    storage = Storage.open(s3_server.root, s3_server.options)
    assert storage.list("exports")["there.pt"] == (tmp_path / "here.pt").stat().st_size
    exported = safetensors.torch.load(storage.read("exports/model.safetensors"))
    assert all(torch.equal(exported[name], tensor) for name, tensor in saved[1].items())
    assert len(answer(capsys, "gc", url, "--keep-last", 1, *common)["deleted"]) == 1
    left = f"{url}/{max(Storage.open(url, s3_server.options).list())}"
    Storage.open(left, s3_server.options).remove("manifest.json")
    assert called(capsys, "verify", left, *common)[0] == called(capsys, "verify", url, *common)[0] == 3
    assert "no manifest.json" in message_of(lambda: load(left, {}, s3_server.options), CheckpointError)
    options.write_text(json.dumps({**s3_server.options, "secret": "sesame-of-tests"}))
    status, text, err = called(capsys, "ls", url, *common)
    assert status == 1 and "sesame" not in text + err and url in err


def test_a_reader_that_goes_away_changes_no_status(saved):
    """The exit status is the command's own, whoever reads the output."""
    folder = saved[0]

    def called_alone(stream, *arguments):
        def act():
            with contextlib.suppress(OSError):
                os.close(2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            if stream is None:
                sys.stdout = None
            else:
                sys.stdout = open(stream, "w")  # noqa: SIM115
            return main([*map(str, arguments)])

        return run_alone(act)

    read_end, write_end = os.pipe()
    os.close(read_end)
    commands = [["ls", folder], ["show", folder], ["verify", folder], ["gc", folder, "--keep-last", 9, "--dry-run"]]
    commands += [["show", folder, "--json"], ["export", folder, folder / "out.pt"], ["plan", "--world-size", 2, 10]]
    for command in commands:
        assert [called_alone(stream, *command) for stream in (write_end, None)] == [0, 0], command
    flip(newest(folder) / "__0_0.distcp", 100)
    assert called_alone(write_end, "verify", folder) == 1
    flip(newest(folder) / "__0_0.distcp", 100)


def test_secrets_are_told_nowhere(tmp_path):
    """By the library, the commands and launch/train.py, with secrets wherever one can be: see the module."""
    program = [sys.executable, "-W", "ignore", "-m", "tests.support.planted_secrets", str(tmp_path)]
    done = subprocess.run(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    told = [line for line in done.stdout.splitlines() if "sesame" in line]
    assert not told, told
    for text in ("could not read loud://host/run/x: LookupError", "Exported the recent average", "== files", "***"):
        assert text in done.stdout
