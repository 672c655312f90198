"""Time of one step in one process, ours beside torch.optim.ASGD, for few large and for many small parameters.

    python -m benchmarks.update --sizes 1x100e6 300x1e5 10000x64

A size is the number of parameters x the elements of each. Gradients lie in ``p.grad``, averaging is on. The contestants
take turns, step by step, so that a disturbance of the machine meets all of them; the figure is the median.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim import ASGD, SGD, Optimizer

from benchmarks.table import print_table, write_json_lines
from dist_asgd import ShardedASGD

COLUMNS = {
    "size": "parameters x elements",
    "ours": "ours, ms",
    "for_loop": "ASGD(foreach=False), ms",
    "foreach": "ASGD(foreach=True), ms",
    "floor": "SGD(momentum, fused), ms",
    "for_loop_over_ours": "for-loop/ours",
    "foreach_over_ours": "foreach/ours",
    "ours_over_floor": "ours/SGD",
}
WARMUP = 3  # steps; averaging starts with the second


def main() -> None:
    options = _arguments()
    torch.set_num_threads(options.threads)
    rows = [_row(count, numel, options.steps) for count, numel in options.sizes]
    print(f"\nfp32, averaging on, {options.threads} threads, one process, median of {options.steps} steps\n")
    print_table(rows, COLUMNS)
    write_json_lines(options.json, rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.update", description=__doc__.splitlines()[0])
    sizes = [(1, 10**8), (300, 10**5), (10_000, 64)]
    parser.add_argument("--sizes", type=_size, nargs="+", default=sizes, metavar="COUNTxELEMENTS")
    parser.add_argument("--steps", type=int, default=15, help="timed ones of each contestant")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("update.jsonl"), metavar="FILE")
    return parser.parse_args()


def _size(text: str) -> tuple[int, int]:
    count, numel = text.split("x")
    return int(float(count)), int(float(numel))


def _row(count: int, numel: int, steps: int) -> dict[str, Any]:
    contestants = {
        "ours": ShardedASGD(_parameters(count, numel), lr=1e-3, t0=0),
        "for_loop": ASGD(_parameters(count, numel), lr=1e-3, t0=0, foreach=False),
        "foreach": ASGD(_parameters(count, numel), lr=1e-3, t0=0, foreach=True),
        # It moves as many bytes an element, in one pass: what memory allows.
        "floor": SGD(_parameters(count, numel), lr=1e-3, momentum=0.9, fused=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for step in range(-WARMUP, steps):
        for name, optimizer in contestants.items():
            taken = _timed(optimizer)
            if step >= 0:
                seconds[name].append(taken)
    times = {name: 1e3 * statistics.median(taken) for name, taken in seconds.items()}
    return {
        "size": f"{count:,} x {numel:,}",
        **{name: round(taken, 2) for name, taken in times.items()},
        "for_loop_over_ours": round(times["for_loop"] / times["ours"], 1),
        "foreach_over_ours": round(times["foreach"] / times["ours"], 1),
        "ours_over_floor": round(times["ours"] / times["floor"], 2),
        "seconds": seconds,
    }


def _parameters(count: int, numel: int) -> list[torch.nn.Parameter]:
    """With gradients, which every step uses again."""
    params = [torch.nn.Parameter(torch.randn(numel)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn(numel)
    return params


def _timed(optimizer: Optimizer) -> float:
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
