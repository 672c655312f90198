"""Memory per rank, ours beside the peers in the same run: optimizer bytes, and the real peak while training.

    python -m benchmarks.memory --parameters 27e6 --ranks 2 4
    python -m benchmarks.memory --tables swap

Two ways of looking, because each has a blind spot:

- *Reachable* (exact, repeatable): the bytes of all different tensor storages that can be reached from the optimizer
  object, without those of the parameters. It cannot see what C++ holds, such as DistributedDataParallel's buckets.
- *Resident* (all of it): the process's resident memory; VmHWM of /proc/self/status is its highest value since
  /proc/self/clear_refs was told to forget, kept by the kernel, so no sample can be missed. malloc is told to map every
  block above 64 KiB by itself and to give it back when freed; then resident is what is live, within about 1 MiB.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.table import print_table, write_json_lines
from tests.support import contestants
from tests.support.memory import (
    MIB,
    measure,
    measure_swap,
)
from tests.support.processes import end_cleanly, free_port, report, start_ranks

NAMES = (
    "ours",
    "ours, 4 MiB buckets",
    "DDP + ours, gradients=reduced",
    "DDP + ASGD",
    "DDP (bucket views) + ASGD",
    "DDP + ZeroRedundancyOptimizer",
    "DDP (bucket views) + ZeroRedundancyOptimizer",
    "FSDP2 + ASGD",
)
COLUMNS = {
    "ranks": "ranks",
    "name": "",
    "before_t0": "optimizer before t0",
    "averaging": "averaging",
    "gradients": "gradients held",
    "rest": "resident at rest",
    "backward_peak": "+ peak of backward",
    "step_peak": "+ peak of step()",
    "peak": "peak",
    "ours_over_peak": "ours/peak",
}
# Ways of evaluating the average, and of training for it.
SWAPS = {
    "ours": "ours",
    "ours, 4 MiB buckets": "ours, 4 MiB buckets",
    "FSDP2 + ours": "FSDP2 + ours",
    "HSDP (2 replicas) + ours": "HSDP (2 replicas) + ours",
    "DDP + ASGD, by hand": "DDP + ASGD",
    "FSDP2 + ASGD, by hand": "FSDP2 + ASGD",
    "DDP + AveragedModel": "DDP + ASGD",
    "DDP + AdamW + averages": "DDP + AdamW",
    "FSDP2 + AdamW + averages": "FSDP2 + AdamW",
    "HSDP (2 replicas) + AdamW + averages": "HSDP (2 replicas) + AdamW",
}
SWAP_COLUMNS = {
    "ranks": "ranks",
    "name": "",
    "parameters": "the rank's parameters",
    "average": "average held",
    "swap_peak": "+ peak of the swap",
    "of_average": "of 1/N of all",
}


def main() -> None:
    options = _arguments()
    if options.worker is not None:
        _worker(options.worker, options.tables[0], options.parameters)
        return
    end_cleanly()
    rows = []
    if "training" in options.tables:
        rows += _print_training(options)
    if "swap" in options.tables:
        rows += _print_swap(options)
    write_json_lines(options.json, rows)


def _print_training(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = [_row(ranks, name, "training", options.parameters) for ranks in options.ranks for name in options.names]
    for row in rows:
        ours = [one["peak"] for one in rows if one["name"] == "ours" and one["ranks"] == row["ranks"]]
        row["ours_over_peak"] = round(ours[0] / row["peak"], 2) if ours else None
    print(f"\n{rows[0]['parameters']} fp32 parameters = {rows[0]['parameters'] * 4 / MIB:.1f} MiB; MiB per rank\n")
    print_table([row | {key: _mib(row[key]) for key in _SIZES} for row in rows], COLUMNS)
    return rows


def _print_swap(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = [_row(ranks, name, "swap", options.parameters) for ranks in options.ranks for name in options.swaps]
    for row in rows:
        row["of_average"] = round(row["swap_peak"] * row["ranks"] / row["whole"], 2)
    print(f"\nfp32 parameters of {_mib(rows[0]['whole'])} MiB; MiB per rank\n")
    sizes = ("parameters", "average", "swap_peak")
    print_table([row | {key: _mib(row[key]) for key in sizes} for row in rows], SWAP_COLUMNS)
    return rows


_SIZES = ("before_t0", "averaging", "gradients", "rest", "backward_peak", "step_peak", "peak")


def _mib(size: int) -> float:
    return round(size / MIB, 2)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=27e6, help="of the model, about")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("memory.jsonl"), metavar="FILE")
    parser.add_argument("--names", nargs="+", default=NAMES, choices=list(contestants.CONTESTANTS), metavar="NAME")
    parser.add_argument("--swaps", nargs="+", default=list(SWAPS), choices=list(SWAPS), metavar="NAME")
    parser.add_argument("--tables", nargs="+", default=["training", "swap"], choices=["training", "swap"])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def _row(ranks: int, name: str, table: str, parameters: float) -> dict[str, Any]:
    """The figures of ``name``, in bytes: of the rank with most of each."""
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    arguments = ["--worker", name, f"--tables={table}", f"--parameters={parameters}"]
    results = start_ranks("benchmarks.memory", arguments, prefixes=[[]] * ranks, environment=environment)
    return {"ranks": ranks, "name": name} | {key: max(result[key] for result in results) for key in results[0]}


def _worker(name: str, table: str, parameters: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if table == "swap":
        ways = {"averaged": name.endswith("AveragedModel"), "beside": name.endswith("+ averages")}
        report(measure_swap(contestants.CONTESTANTS[SWAPS[name]], parameters, **ways))
    else:
        report(measure(contestants.CONTESTANTS[name], parameters))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
