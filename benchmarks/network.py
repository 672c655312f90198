"""Time and bytes of one training iteration on two hosts, ours beside the peers on the same link in the same run.

    python -m benchmarks.network --rate 1gbit --parameters 27e6

Needs root and iproute2 (see netns.py). Time is what a rank sees per iteration (forward, backward, step) in a loop that
nothing interrupts. An all-gather that runs under the next forward makes single iterations uneven (the minimum of ours
says little), so the mean over the loop stands beside the median. Bytes are what the kernel counted as sent by a rank,
headers and acknowledgements included.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.quiet import undisturbed
from benchmarks.table import print_table, write_json_lines
from dist_asgd import ShardedASGD
from tests.support import contestants, netns
from tests.support.processes import end_cleanly, report

NAMES = (
    "ours",
    "ours, without module=",
    "ours, 4 MiB buckets",
    "ours, wire_dtype=bf16",
    "DDP + ASGD",
    "DDP + ZeroRedundancyOptimizer",
    "FSDP2 + ASGD",
    "FSDP2 (no reshard) + ASGD",
)
COLUMNS = {
    "name": "",
    "median_ms": "median ms",
    "min_ms": "min ms",
    "mean_ms": "mean ms",
    "ours_over_median": "ours/it",
    "ours_over_mean": "ours/it (mean)",
    "others": "others' CPU",
    "sent_mb": "MB sent per rank",
    "sent_ratio": "of 2P(N-1)/N",
}


def main() -> None:
    options = _arguments()
    if options.worker is not None:
        _worker(options)
        return
    end_cleanly()
    reason = netns.why_not()
    if reason is not None:
        sys.exit(f"benchmarks.network: {reason}")
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in options.names}
    with netns.two_hosts(options.rate) as hosts:
        for _ in range(options.rounds):  # interleaved, so that a disturbance of the machine does not meet one row only
            for name in options.names:
                results[name].append(_round(hosts, name, options))
    rows = summarise(results, options.rate or "unlimited")
    print(f"\n{rows[0]['parameters']} fp32 parameters, 2 hosts, {rows[0]['rate']}, averaging on, per iteration\n")
    print_table(rows, COLUMNS)
    write_json_lines(options.json, rows)


def _round(hosts: Sequence[netns.Host], name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Rank 0's report, and under "others" what other processes used of the machine meanwhile."""
    numbers = ("parameters", "iterations", "warmup")
    arguments = ["--worker", name, *(f"--{key}={getattr(options, key)}" for key in numbers)]
    run = partial(netns.run_on_hosts, hosts, "benchmarks.network", arguments)
    ranks, others = undisturbed(run, options.patience)
    return ranks[0] | {"others": others}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.network", description=__doc__.splitlines()[0])
    parser.add_argument("--rate", help="of the link, as tc writes it: 1gbit, 200mbit (default: not limited)")
    parser.add_argument("--parameters", type=float, default=27e6, help="of the model, about")
    parser.add_argument("--iterations", type=int, default=10, help="timed ones per round")
    parser.add_argument("--warmup", type=int, default=3, help="iterations before those")
    parser.add_argument("--rounds", type=int, default=2, help="fresh processes each time")
    patience = "seconds to wait, before each round of each row, for other processes to be quiet"
    parser.add_argument("--patience", type=float, default=0.0, help=patience)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("network.jsonl"), metavar="FILE")
    parser.add_argument("--names", nargs="+", default=NAMES, choices=list(contestants.CONTESTANTS), metavar="NAME")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def _worker(options: argparse.Namespace) -> None:
    """One rank: warm up, then time and count ``iterations`` iterations."""
    torch.set_num_threads(1)  # two ranks on a machine of two cores
    dist.init_process_group("gloo")
    model = contestants.make_model(options.parameters)
    size = contestants.parameter_bytes(model)
    model, optimizer = contestants.CONTESTANTS[options.worker](model, 0.0)
    batch = contestants.make_batch(dist.get_rank())
    for _ in range(options.warmup):
        contestants.iterate(model, optimizer, batch)
    dist.barrier()
    before = netns.settled_sent_bytes()
    times = []
    for _ in range(options.iterations):
        start = time.perf_counter()
        contestants.iterate(model, optimizer, batch)
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    if isinstance(optimizer, ShardedASGD):
        optimizer.synchronize()  # what step() left under way
    times[-1] += time.perf_counter() - start
    sent = netns.settled_sent_bytes() - before
    report({"seconds": times, "sent": sent / options.iterations, "parameter_bytes": size})
    dist.barrier()
    dist.destroy_process_group()


def summarise(results: dict[str, list[dict[str, Any]]], rate: str) -> list[dict[str, Any]]:
    """One row per contestant from its rounds; ``ours_over_*`` is our time divided by the row's."""
    rows = []
    for name, rounds in results.items():
        seconds = [second for one in rounds for second in one["seconds"]]
        sent, size = _mean([one["sent"] for one in rounds]), rounds[0]["parameter_bytes"]
        times = {"median_ms": round(1e3 * statistics.median(seconds)), "min_ms": round(1e3 * min(seconds))}
        times["mean_ms"] = round(1e3 * _mean(seconds))
        traffic = {"sent_mb": round(sent / 1e6, 1), "sent_ratio": round(sent / size, 3)}  # N = 2: 2P(N-1)/N is P
        times["others"] = round(max(one["others"] for one in rounds), 2)
        rows.append({"name": name, **times, **traffic, "parameters": size // 4, "rate": rate, "seconds": seconds})
    ours = next((row for row in rows if row["name"] == "ours"), None)
    for row in rows:
        for kind in ("median", "mean"):
            row[f"ours_over_{kind}"] = ours and round(ours[f"{kind}_ms"] / row[f"{kind}_ms"], 2)
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
