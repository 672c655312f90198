"""The dist-asgd command, in this process and once as ``python -m dist_asgd``."""

import inspect
import json
import runpy
import subprocess
import sys

import pytest
import torch

from dist_asgd import ShardedASGD, __version__
from dist_asgd.cli.main import main
from dist_asgd.cli.output import format_bytes
from dist_asgd.cli.plan import BUCKET_BYTES

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
    parameters = [torch.nn.Parameter(torch.zeros(3, 5, dtype=getattr(torch, dtype))) for _ in range(2)]
    optimizer = torch.optim.ASGD(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    stored = sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())
    assert plan(capsys, "--world-size", "2", "--dtype", dtype, "3x5", "3x5")["bytes_per_rank"]["torch_asgd"] == stored


@pytest.mark.parametrize(("dtype", "master", "average"), [("float64", 0, 8), ("float32", 0, 4), ("bfloat16", 4, 4)])
def test_plan_bytes_per_rank(capsys, dtype, master, average):
    result = plan(capsys, "--world-size", "4", "--dtype", dtype, "64x64")
    assert result["bytes_per_rank"]["before_averaging"] == master * 1024
    assert result["bytes_per_rank"]["averaging"] == (master + average) * 1024


def test_plan_as_a_table(capsys):
    assert main(["plan", "--world-size", "3", "--dtype", "bfloat16", "--bucket-bytes", "4096", *SHAPES]) == 0
    out = capsys.readouterr().out
    table = out.split("\n\n")[1].splitlines()
    assert len(table) == 4 and len({len(line) for line in table}) == 1
    assert table[-1].split()[:3] == ["total", "4", "1,002,010"]
    assert "torch.optim.ASGD" in out and "fp32 masters" in out


def test_plan_default_bucket_is_the_optimizers():
    assert inspect.signature(ShardedASGD.__init__).parameters["bucket_bytes"].default == BUCKET_BYTES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["nonsense"], "invalid choice"),
        (["plan", "--world-size", "3"], "SHAPE"),
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
