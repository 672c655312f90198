"""The dist-asgd command, in this process and once as ``python -m dist_asgd``."""

import json
import runpy
import subprocess
import sys

import pytest
import torch

from dist_asgd import __version__
from dist_asgd.cli.main import main
from dist_asgd.cli.output import format_bytes

SHAPES = ["1000x1000", "1000", "1000", "10"]


def plan(capsys, *arguments):
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_plan_counts_every_element_once(capsys):
    result = plan(capsys, "--world-size", "3", *SHAPES)
    assert result["world_size"] == 3
    assert sum(bucket["parameters"] for bucket in result["buckets"]) == 4
    assert sum(bucket["elements"] for bucket in result["buckets"]) == 1_002_010
    for bucket in result["buckets"]:
        assert bucket["elements"] + bucket["padding"] == 3 * bucket["elements_per_rank"]


def test_plan_bucket_bytes_cuts_buckets(capsys):
    one = plan(capsys, "--world-size", "2", *SHAPES)
    several = plan(capsys, "--world-size", "2", "--bucket-bytes", "4096", *SHAPES)
    assert len(one["buckets"]) == 1
    assert [bucket["elements"] for bucket in several["buckets"]] == [1010, 1000, 1_000_000]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_plan_knows_what_torch_stores(capsys, dtype):
    ways = plan(capsys, "--world-size", "2", "--dtype", dtype, "3x5", "3x5")["ways"]
    for kind, name in ((torch.optim.ASGD, "DDP + torch.optim.ASGD"), (torch.optim.AdamW, "DDP + AdamW, no average")):
        parameters = [torch.nn.Parameter(torch.zeros(3, 5, dtype=getattr(torch, dtype))) for _ in range(2)]
        optimizer = kind(parameters, foreach=False)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        stored = sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())
        assert ways[name]["optimizer_state"] == stored, name


@pytest.mark.parametrize(("dtype", "master", "average"), [("float64", 0, 8), ("float32", 0, 4), ("bfloat16", 4, 4)])
def test_plan_bytes_per_rank(capsys, dtype, master, average):
    ours = plan(capsys, "--world-size", "4", "--dtype", dtype, "--averages", "3", "64x64")["ways"]["ShardedASGD"]
    assert (ours["optimizer_state"], ours["averages"]) == (master * 1024, 3 * average * 1024)


def test_plan_times_are_bytes_over_speed(capsys):
    ways = plan(capsys, "--world-size", "4", "--link", "8", "--store", "2.5", "1000x1000")["ways"]
    for way in ways.values():
        assert way["seconds_to_send"] == way["sent"] / 1e9 and way["seconds_to_write"] == way["written"] / 2.5e6
    assert ways["ShardedASGD"]["written"] * 4 == ways["ShardedASGD"]["checkpoint"]


def test_plan_as_a_table(capsys):
    assert main(["plan", "--world-size", "3", "--bucket-bytes", "4096", "--store", "100", *SHAPES]) == 0
    heading, table, notes = capsys.readouterr().out.split("\n\n")
    assert heading == "4 parameters of 1,002,010 elements (3.82 MiB), zero over 3 ranks; bytes of one rank"
    rows = table.splitlines()
    assert len(rows) == 10 and len({len(line) for line in rows}) == 1
    assert rows[0].split("  ")[-1] == "DDP + AdamW, no average" and "link" not in table
    assert notes.startswith("ShardedASGD has 3 buckets")


def test_plan_of_a_model_that_a_function_makes(capsys, tmp_path, monkeypatch):
    (tmp_path / "planned_models.py").write_text(
        "import torch\n"
        "def tied():\n"
        "    model = torch.nn.Sequential(torch.nn.Embedding(10**9, 64), torch.nn.BatchNorm1d(64))\n"
        "    model.append(torch.nn.Linear(64, 10**9, bias=False, dtype=torch.bfloat16)).requires_grad_(False)\n"
        "    model[2].weight, model[1].weight.requires_grad = model[0].weight, True\n"
        "    return model\n"
        "def nothing(): return torch.nn.ReLU()\n"
        "def fails(): raise OSError('no such disk')\n"
    )
    monkeypatch.chdir(tmp_path)
    result = plan(capsys, "--world-size", "2", "planned_models:tied")
    assert (result["parameters"], result["elements"]) == (3, 64 * 10**9 + 128), "256 GB that nobody has allocated"
    ours = result["ways"]["ShardedASGD"]
    assert ours["parameters"] == 4 * (64 * 10**9 + 2 * 64) + 4 * 2 * 64 + 8, "with BatchNorm's buffers"
    assert ours["averages"] == 4 * 32, "one parameter of 64 elements is trained"
    assert (
        plan(capsys, "--world-size", "2", "--dtype", "bfloat16", "planned_models:tied")["bytes"] == result["bytes"] / 2
    )
    for function, said in (
        ("planned_models:nothing", "returned ReLU"),
        ("planned_models:fails", "OSError: no such disk"),
        ("planned_models:absent", "absent"),
        ("no_such_package:f", "no_such_package"),
    ):
        assert main(["plan", "--world-size", "2", function]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["10", "torch.nn:Transformer"], "give it alone"),
        (["--layout", "tp", "10"], "--cut"),
        (["--layout", "tp", "--cut", "x", "10"], "'x' fits no parameter"),
        (["--cut", "0", "10"], "--layout tp"),
        (["--layout", "hsdp", "--replicas", "2", "10"], "not 3"),
    ],
)
def test_plan_of_options_that_do_not_fit_together(capsys, arguments, message):
    assert main(["plan", "--world-size", "3", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_plan_default_bucket_is_that_of_the_backend(capsys):
    two = ("7000x1000", "7000x1000")  # 28 MB each
    counts = [len(plan(capsys, "--world-size", "2", "--backend", name, *two)["buckets"]) for name in ("gloo", "nccl")]
    assert counts == [2, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["nonsense"], "invalid choice"),
        (["plan", "--world-size", "3"], "MODEL"),
        (["plan", "--world-size", "3", "--link", "0", "10"], "'0' is not a positive number"),
        (["plan", "--world-size", "3", "--store", "fast", "10"], "'fast' is not a positive number"),
        (["plan", "10"], "--world-size"),
        (["plan", "--world-size", "0", "10"], "'0' is not a positive whole number"),
        (["plan", "--world-size", "3", "10y10"], "'10y10' is no shape"),
        (["plan", "--world-size", "3", "10x"], "'10x' is no shape"),
        (["plan", "--world-size", "3", "0x10"], "'0x10' is no shape"),
        (["plan", "--world-size", "3", "--dtype", "int8", "10"], "int8"),
        (["plan", "--world-size", "3", "--bucket-bytes", "1.5", "10"], "'1.5' is not a positive whole number"),
    ],
)
def test_wrong_arguments_exit_with_2_and_a_reason(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_sizes_are_readable():
    sizes = (0, 1023, 1024, 25 * 2**20, 2**41, 2**55)
    assert [format_bytes(n) for n in sizes] == ["0 B", "1023 B", "1.00 KiB", "25.00 MiB", "2.00 TiB", "32768.00 TiB"]


def test_the_package_is_a_program(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dist_asgd", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("dist_asgd", run_name="__main__")
    assert not ended.value.code and capsys.readouterr().out.strip() == __version__


def test_output_that_nobody_reads_or_can_be_written():
    command = [
        sys.executable,
        "-m",
        "dist_asgd",
        "plan",
        "--world-size",
        "2",
        "--json",
        *["100x100"] * 5000,
        "--bucket-bytes",
        "1",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait() == 0 and process.stderr.read() == ""
    for closed in (">&-", ">&- 2>&-", "2>&- | true; exit ${PIPESTATUS[0]}"):
        shell = ["bash", "-c", f"{sys.executable} -m dist_asgd --help {closed}"]
        assert subprocess.run(shell, stdout=subprocess.DEVNULL).returncode == 0
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (
        done.returncode == 1
        and done.stderr.startswith("dist-asgd: cannot write the output")
        and "\n" not in done.stderr[:-1]
    )
