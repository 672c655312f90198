"""What ``verify_every=`` costs: a step that compares all copies beside one that does not, in one run.

    python -m benchmarks.corruption --sizes 1x25e6 250x1e5 10000x64

A size is the number of parameters x the elements of each. Ranks hold all parameters and share their state
(``gradients="reduced"``); every second step compares copies. Steps are counted without forward, backward and the
reduction of gradients, over the loopback interface. "digest" and "sum" are bytes of the parameters read a second by one
rank alone: by the digests that a checked step compares, and by ``torch.sum``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.table import print_table, write_json_lines
from benchmarks.update import size
from dist_asgd import ShardedASGD
from dist_asgd.comm.digests import digests
from tests.support.ranks import run_ranks

COLUMNS = {
    "size": "parameters x elements",
    "dtype": "dtype",
    "unchecked": "step, ms",
    "checked": "checked step, ms",
    "ratio": "checked/unchecked",
    "digest": "digest, GB/s",
    "sum": "sum, GB/s",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [(1, 25 * 10**6), (250, 10**5), (10_000, 64)]
    parser.add_argument("--sizes", type=size, nargs="+", default=sizes, metavar="COUNTxELEMENTS")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help="steps of each kind")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("corruption.jsonl"), metavar="FILE")
    arguments = parser.parse_args()
    rows = []
    for count, numel in arguments.sizes:
        for dtype in (torch.float32, torch.bfloat16):
            rows.append(run_ranks(arguments.ranks, _row, count, numel, dtype, arguments.steps, timeout=600)[0])
    print(f"\n{arguments.ranks} ranks of 1 thread, median of {arguments.steps} steps of each kind\n")
    print_table(rows, COLUMNS)
    write_json_lines(arguments.json, rows)


def _row(rank: int, count: int, numel: int, dtype: torch.dtype, steps: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    params = [torch.nn.Parameter(torch.ones(numel, dtype=dtype)) for _ in range(count)]
    optimizer = ShardedASGD(params, lr=1e-3, t0=0, gradients="reduced", verify_every=2)
    for param in params:
        param.grad = torch.ones_like(param)
    seconds: tuple[list[float], list[float]] = ([], [])  # of checked steps, and of the others
    for step in range(2 * steps + 4):
        dist.barrier()
        taken = _timed(optimizer.step)
        if step >= 4:  # the first ones compare more, and begin averages
            seconds[step % 2].append(taken)
    checked, unchecked = map(statistics.median, seconds)
    dist.barrier()
    compared = [tensor for bucket in optimizer._all_buckets() for tensor in bucket.value_tensors()]
    alone = _read_rates(compared) if rank == 0 else (0.0, 0.0)
    dist.barrier()
    return {
        "size": f"{count:,} x {numel:,}",
        "dtype": str(dtype).removeprefix("torch."),
        "unchecked": 1e3 * unchecked,
        "checked": 1e3 * checked,
        "ratio": checked / unchecked,
        "digest": alone[0],
        "sum": alone[1],
        "seconds": seconds,
    }


def _read_rates(tensors: list[torch.Tensor]) -> tuple[float, float]:
    """Returns how many GB of ``tensors`` a digest and a sum read in a second."""
    gigabytes = sum(tensor.nbytes for tensor in tensors) / 1e9
    reads = (lambda: digests(tensors), lambda: [tensor.sum() for tensor in tensors])
    digest, whole = (gigabytes / statistics.median(_timed(read) for _ in range(9)) for read in reads)
    return digest, whole


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
