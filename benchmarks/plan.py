"""What ``dist-asgd plan`` says of a training by launch/train.py, beside what its ranks really keep, send and save.

    python -m benchmarks.plan

Each row is the rank that has most. Memory is counted as tensors that can be reached from the optimizer and the model;
DistributedDataParallel's buckets, which C++ holds, cannot, so its gradients are counted once on both sides. Bytes sent
are those of two hosts (tests/support/netns.py), counted by the kernel: of a whole iteration, or of ``step()`` alone
under tensor parallelism, whose forward and backward send activations. Without root there is no such row.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from benchmarks.table import print_table, write_json_lines
from benchmarks.wire import count
from dist_asgd.cli.main import main as dist_asgd
from tests.support import netns
from tests.support.memory import reachable
from tests.support.processes import ROOT, end_cleanly, free_port, report, start_ranks

sys.path.insert(0, str(ROOT / "launch"))  # where train.py finds its neighbours

import data
import evaluation
import train
from model import build_model
from run import Run, next_byte_loss
from world import join_world

CUT = ["blocks.*.attention.1.*", "blocks.*.perceptron.1.*", "blocks.*.perceptron.3.weight"]  # by launch/parallel.py
LAYOUTS = ("zero", "ddp", "fsdp", "hsdp", "tp")
WIDTH, DEPTH, LENGTH = 256, 4, 64
COLUMNS = {
    "ranks": "ranks",
    "layout": "",
    "what": "bytes",
    "planned": "planned",
    "measured": "measured",
    "ratio": "ratio",
}
AVERAGES = len(evaluation.AVERAGES)


def gpt() -> nn.Module:
    """Returns the model that ``dist-asgd plan`` is asked about."""
    return build_model("gpt", width=WIDTH, layers=DEPTH, heads=4, context=LENGTH, dropout=0.0)


def main() -> None:
    options = _arguments()
    if options.worker:
        _worker(options.worker, Path(options.folder))
        return
    end_cleanly()
    reason = netns.why_not()
    if reason is not None:
        print(f"bytes sent are not counted: {reason}")
    rows = [
        row
        for ranks in options.ranks
        for layout in options.layouts
        for row in compare(layout, ranks, counts_sent=reason is None and ranks == 2)
    ]
    print_table(rows, COLUMNS)
    write_json_lines(options.json, rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, choices=LAYOUTS)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("plan.jsonl"), metavar="FILE")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(layout: str, ranks: int, *, counts_sent: bool) -> list[dict[str, Any]]:
    """Returns one row for each figure: planned, measured, and measured/planned."""
    expected, found = planned(layout, ranks), measured(layout, ranks, counts_sent)
    return [
        {"ranks": ranks, "layout": layout, "what": what, "planned": expected[what], "measured": value}
        | {"ratio": round(value / expected[what], 4)}
        for what, value in found.items()
    ]


def planned(layout: str, ranks: int) -> dict[str, int]:
    """Returns what ``dist-asgd plan --json`` prints of ShardedASGD."""
    arguments = ["plan", "benchmarks.plan:gpt", "--world-size", str(ranks), "--layout", layout, "--backend", "gloo"]
    arguments += [word for pattern in CUT if layout == "tp" for word in ("--cut", pattern)]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = dist_asgd([*arguments, "--averages", str(AVERAGES), "--json"])
    if status:
        raise RuntimeError(f"dist-asgd {' '.join(arguments)} ended with {status}")
    found = json.loads(printed.getvalue())["ways"]["ShardedASGD"]
    if layout == "ddp":
        found["gradients"] //= 2
    return found | {"optimizer": found["optimizer_state"] + found["averages"]}


def measured(layout: str, ranks: int, counts_sent: bool) -> dict[str, int]:
    """Returns the figures of the ranks of one run: the most of them, and of a checkpoint the bytes of its files."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        arguments = ["--worker", layout, "--folder", folder]
        if counts_sent:
            hosts = stack.enter_context(netns.two_hosts())
            results = netns.run_on_hosts(hosts, "benchmarks.plan", arguments)
        else:
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
            results = start_ranks("benchmarks.plan", arguments, prefixes=[[]] * ranks, environment=environment)
        found = {what: max(result[what] for result in results) for what in results[0]}
        if not counts_sent:
            found.pop("sent")
        files = [path for path in Path(folder, "checkpoints").rglob("*") if path.is_file()]
        return found | {"checkpoint": sum(path.stat().st_size for path in files)}


def _worker(layout: str, folder: Path) -> None:
    """One rank: some steps of launch/train.py, until both averages are kept, and then one of each that is measured."""
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    text = "--data {} --held-out-bytes 2000 --out {} --checkpoint-dir {}"
    files = text.format(ROOT / "launch" / "*.py", folder / "out", folder / "checkpoints").split()
    size = f"--width {WIDTH} --layers {DEPTH} --length {LENGTH} --heads 4 --t0 1 --parallel {layout}".split()
    run = train.build_run(train.parse_args([*size, *files]), join_world())
    for step in range(1, 6):
        train.train_step(run, step)
    model, optimizer = run.model, run.optimizer
    result: dict[str, Any] = {"parameters": sum(_local(param).nbytes for param in model.parameters())}
    at_rest = result["optimizer"] = reachable(optimizer, model)
    _backward(run)
    optimizer.clip_grad_norm_(1.0)
    result["gradients"] = reachable(optimizer, model) - at_rest
    step = _sent(optimizer.step)
    optimizer.zero_grad()
    iteration = _sent(lambda: train.train_step(run, 7))
    result["sent"] = step if layout == "tp" else iteration
    run.checkpointer.save(7, {"model": model, "optimizer": optimizer})
    report(result)
    run.world.close()


def _backward(run: Run) -> None:
    args, layout = run.args, run.layout
    share = data.rank_share(args.batch, layout.data_rank, layout.data_size)
    x, y = data.sequences(run.text.train, share, seed=args.seed, step=6, length=args.length)
    next_byte_loss(run, x, y, "mean").backward()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sent(work: Callable[[], object]) -> int:
    """Bytes that this host sends for ``work``; 0 where it is not one of two hosts."""
    if os.environ["GLOO_SOCKET_IFNAME"] != netns.INTERFACE:
        work()
        return 0
    return count(work)


if __name__ == "__main__":
    main()
