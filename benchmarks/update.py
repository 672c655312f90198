"""Time of one step in one process, ours beside torch.optim.ASGD's forms, for few large and for many small parameters.

    python -m benchmarks.update --sizes 1x100e6 300x1e5 10000x64

A size is the number of parameters x the elements of each. Gradients lie in ``p.grad``. The contestants take turns of
five steps, so that a disturbance of the machine meets all of them; the figure is the median. Small models stay in the
processor's caches during a turn; "cold" is the ratio for the first steps of turns, which find there what other
contestants have left. The floor is torch's fused
SGD: with momentum its one pass moves as many bytes as a step that averages, without as many as a step before ``t0``.
"compiled" is the for-loop under torch.compile; it is left out where compiling so many parameters would take minutes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim import ASGD, SGD, Optimizer

from benchmarks.table import print_table, write_json_lines
from dist_asgd import ShardedASGD

COLUMNS = {
    "size": "parameters x elements",
    "phase": "phase",
    "ours": "ours, ms",
    "for_loop": "ASGD for-loop, ms",
    "foreach": "foreach, ms",
    "compiled": "compiled, ms",
    "floor": "fused SGD, ms",
    "for_loop_over_ours": "for-loop/ours",
    "cold": "for-loop/ours, cold",
    "foreach_over_ours": "foreach/ours",
    "compiled_over_ours": "compiled/ours",
    "ours_over_floor": "ours/SGD",
}
TURN = 5  # steps
MOST_COMPILED = 300  # parameters


def main() -> None:
    options = _arguments()
    torch.set_num_threads(options.threads)
    rows = [_row(*size, phase, options.turns) for size in options.sizes for phase in ("averaging", "before t0")]
    print(f"\nfp32, {options.threads} threads, one process, median of {options.turns * TURN} steps\n")
    print_table(rows, COLUMNS)
    write_json_lines(options.json, rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.update", description=__doc__.splitlines()[0])
    sizes = [(1, 10**6), (1, 10**7), (1, 10**8), (300, 10**5), (1000, 1000), (10_000, 64)]
    parser.add_argument("--sizes", type=size, nargs="+", default=sizes, metavar="COUNTxELEMENTS")
    parser.add_argument("--turns", type=int, default=5, help="timed ones of each contestant, of five steps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("update.jsonl"), metavar="FILE")
    return parser.parse_args()


def size(text: str) -> tuple[int, int]:
    count, numel = text.split("x")
    return int(float(count)), int(float(numel))


def _row(count: int, numel: int, phase: str, turns: int) -> dict[str, Any]:
    averaging = phase == "averaging"
    options: dict[str, Any] = {"lr": 1e-3, "t0": 0 if averaging else 1e9}
    contestants = {
        "ours": _step(ShardedASGD(_parameters(count, numel), **options)),
        "for_loop": _step(ASGD(_parameters(count, numel), foreach=False, **options)),
        "foreach": _step(ASGD(_parameters(count, numel), foreach=True, **options)),
        "floor": _step(SGD(_parameters(count, numel), lr=1e-3, momentum=0.9 if averaging else 0, fused=True)),
    }
    if count <= MOST_COMPILED:
        peer = ASGD(_parameters(count, numel), foreach=False, **options)
        contestants["compiled"] = torch.compile(_step(peer))
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(1 + turns):
        for name, take_step in contestants.items():
            taken = [_timed(take_step) for _ in range(TURN)]
            if turn:  # the first warms up; averaging starts in it
                seconds[name] += taken
    times = {name: 1e3 * statistics.median(taken) for name, taken in seconds.items()}
    firsts = {name: statistics.median(taken[::TURN]) for name, taken in seconds.items()}
    peers = [name for name in times if name not in ("ours", "floor")]
    return {
        "size": f"{count:,} x {numel:,}",
        "phase": phase,
        "compiled": None,
        "compiled_over_ours": None,
        **{name: round(taken, 2) for name, taken in times.items()},
        **{f"{name}_over_ours": round(times[name] / times["ours"], 1) for name in peers},
        "cold": round(firsts["for_loop"] / firsts["ours"], 1),
        "ours_over_floor": round(times["ours"] / times["floor"], 2),
        "seconds": seconds,
    }


def _parameters(count: int, numel: int) -> list[torch.nn.Parameter]:
    """With gradients, which every step uses again."""
    params = [torch.nn.Parameter(torch.randn(numel)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn(numel)
    return params


def _step(optimizer: Optimizer) -> Callable[[], None]:
    def take_step() -> None:
        optimizer.step()

    return take_step


def _timed(take_step: Callable[[], None]) -> float:
    start = time.perf_counter()
    take_step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
