"""Time that the host spends in step() for each bucket: many buckets of parameters so small that arithmetic is nothing.

    python -m benchmarks.host_time --buckets 160

A model of 1e9 fp32 parameters has 160 buckets of 25 MiB. On a GPU the host must have started the work of one bucket
before the device has done the work of the one before it. Beside ours, in the same run and process and on parameters of
equal shapes, is torch.optim.ASGD(foreach=True), which sends nothing. Both take turns of five steps; a step's gradients
come from a backward, which is not timed. Of two ranks the slower one's median counts. "CPU" is the median time that the
thread in step() had a processor, without waits for the other rank, for gloo's threads or for other processes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import ASGD, Optimizer

from benchmarks.table import print_table, write_json_lines
from dist_asgd import ShardedASGD
from tests.support.processes import end_cleanly, free_port, report, start_ranks

NUMEL = 64  # elements of a parameter
COLUMNS = {
    "ranks": "ranks",
    "gradients": "gradients",
    "buckets": "buckets",
    "parameters": "parameters",
    "ours": "ours, ms",
    "ours_cpu": "ours, CPU ms",
    "foreach": "foreach, ms",
    "foreach_cpu": "foreach, CPU ms",
    "per_bucket": "ours, CPU us for each bucket",
    "foreach_over_ours": "foreach/ours, CPU",
}
CASES = ((1, "local"), (2, "local"), (2, "reduced"))  # the number of ranks, and who averages gradients
TURN = 5  # steps


def main() -> None:
    options = _arguments()
    if options.worker:
        _worker(options)
        return
    end_cleanly()
    rows = [_row(options, *case) for case in CASES]
    print(f"\nfp32, {NUMEL} elements a parameter, gloo, CPU, 1 thread, median of {options.turns * TURN} steps\n")
    print_table(rows, COLUMNS)
    write_json_lines(options.json, rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_time", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--buckets", type=int, default=160)
    parser.add_argument("--parameters", type=int, default=4, help="in each bucket")
    parser.add_argument("--turns", type=int, default=40, help="timed ones of each contestant, of five steps")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("host_time.jsonl"), metavar="FILE")
    parser.add_argument("--gradients", default="local", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _row(options: argparse.Namespace, ranks: int, gradients: str) -> dict[str, Any]:
    arguments = ["--worker", f"--gradients={gradients}"]
    arguments += [f"--{name}={getattr(options, name)}" for name in ("buckets", "parameters", "turns")]
    network = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    reports = start_ranks("benchmarks.host_time", arguments, prefixes=[()] * ranks, environment=network)
    names = ("ours", "ours_cpu", "foreach", "foreach_cpu")
    times = {name: 1e3 * max(statistics.median(one[name]) for one in reports) for name in names}
    return {
        "ranks": ranks,
        "gradients": gradients,
        "buckets": reports[0]["buckets"],
        "parameters": options.buckets * options.parameters,
        **{name: round(taken, 2) for name, taken in times.items()},
        "per_bucket": round(1e3 * times["ours_cpu"] / reports[0]["buckets"], 1),
        "foreach_over_ours": round(times["foreach_cpu"] / times["ours_cpu"], 1),
    }


def _worker(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)  # with "reduced" nothing else makes parameters and gradients equal on the ranks
    dist.init_process_group("gloo")
    count = options.buckets * options.parameters
    own, peers = ([torch.nn.Parameter(torch.randn(NUMEL)) for _ in range(count)] for _ in range(2))
    bucket_bytes = options.parameters * NUMEL * 4
    ours = ShardedASGD(own, lr=1e-3, t0=0, gradients=options.gradients, bucket_bytes=bucket_bytes)
    contestants = {"ours": (ours, own), "foreach": (ASGD(peers, lr=1e-3, t0=0, foreach=True), peers)}
    seconds = defaultdict[str, list[float]](list)
    for turn in range(1 + options.turns):
        for name, contestant in contestants.items():
            taken = [_timed_step(*contestant) for _ in range(TURN)]
            if turn:  # the first warms up; averaging starts in it
                seconds[name] += [wall for wall, _ in taken]
                seconds[f"{name}_cpu"] += [cpu for _, cpu in taken]
    report(seconds | {"buckets": len(ours._all_buckets())})
    dist.barrier()
    dist.destroy_process_group()


def _timed_step(optimizer: Optimizer, params: Sequence[Tensor]) -> tuple[float, float]:
    """Returns the seconds of one step: those that passed, and those in which this thread had a processor."""
    optimizer.zero_grad()
    torch.stack([param.square().sum() for param in params]).sum().backward()
    dist.barrier()
    start, cpu = time.perf_counter(), time.thread_time()
    optimizer.step()
    return time.perf_counter() - start, time.thread_time() - cpu


if __name__ == "__main__":
    main()
