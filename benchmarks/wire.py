"""Bytes sent per rank in one training step on two hosts, counted by the kernel; ours beside the peers in the same run.

    python -m benchmarks.wire --parameters 27e6

Needs root and iproute2 (see netns.py). P is the bytes of the parameters, N = 2 ranks; a step that reduces each
gradient and distributes each parameter once costs 2P(N-1)/N = P. Headers and acknowledgements are counted as the hosts
hand them to the link, in segments of up to 64 KiB (a network card cuts them up later).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.table import print_table, write_json_lines
from dist_asgd import ShardedAverages
from tests.support import contestants, netns
from tests.support.processes import end_cleanly, report

NAMES = (
    "ours",
    "DDP + ours, gradients=reduced",
    "DDP + ASGD",
    "DDP + ZeroRedundancyOptimizer",
    "FSDP2 + ASGD",
    "FSDP2 (no reshard) + ASGD",
    "DDP + AdamW",
    "DDP + AdamW + averages",
    "FSDP2 + AdamW",
    "FSDP2 + AdamW + averages",
)
AVERAGES = " + averages"  # at the end of a name: with ShardedAverages beside the optimizer
COLUMNS = {
    "name": "",
    "step": "one step, bytes",
    "step_ratio": "of 2P(N-1)/N",
    "update": "of these step()",
    "accumulate": "a backward under no_sync",
    "swap": "averages in and out",
    "idle": "idle",
}
MICRO_BATCHES = 3  # backward passes counted under no_sync


def main() -> None:
    options = _arguments()
    if options.worker:
        _worker(options.names, options.parameters)
        return
    end_cleanly()
    reason = netns.why_not()
    if reason is not None:
        sys.exit(f"benchmarks.wire: {reason}")
    with netns.two_hosts() as hosts:
        rows = measure(hosts, options.names, options.parameters)
    print(f"\n{rows[0]['parameters']} fp32 parameters, 2 hosts, the larger of both ranks' counts\n")
    print_table(rows, COLUMNS)
    write_json_lines(options.json, rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wire", description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=27e6, help="of the model, about")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("wire.jsonl"), metavar="FILE")
    parser.add_argument("--names", nargs="+", default=NAMES, metavar="NAME")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(hosts: Sequence[netns.Host], names: Sequence[str], parameters: float) -> list[dict[str, Any]]:
    """One row per name: bytes sent per rank (the larger of the two ranks' counts) in each phase.

    ``step``: forward, backward and step(); ``update``: step() alone; ``accumulate``: one backward under no_sync
    (None for the peers); ``swap``: averaged_parameters() of averages beside the optimizer (None without); ``idle``: as
    long without any work, the noise of the link.
    """
    arguments = ["--worker", f"--parameters={parameters}", "--names", *names]
    ranks = netns.run_on_hosts(hosts, "benchmarks.wire", arguments)
    return [_row(name, [rank[name] for rank in ranks]) for name in names]


def _row(name: str, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    size = ranks[0]["parameter_bytes"]
    phases = {phase: max(rank[phase] for rank in ranks) for phase in ("step", "update", "idle")}
    own = {key: ranks[0][key] and max(rank[key] for rank in ranks) for key in ("accumulate", "swap")}
    ratio = round(phases["step"] / size, 4)
    return {"name": name, **phases, **own, "step_ratio": ratio, "parameters": size // 4}


def _worker(names: Sequence[str], parameters: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    report({name: _phases(name, parameters) for name in names})
    dist.barrier()
    dist.destroy_process_group()


def _phases(name: str, parameters: float) -> dict[str, Any]:
    """One rank, one contestant: two steps to warm up, then each phase by itself."""
    model = contestants.make_model(parameters)
    size = contestants.parameter_bytes(model)
    model, optimizer = contestants.CONTESTANTS[name.removesuffix(AVERAGES)](model, 0.0)
    averages = contestants.averages_beside(model, optimizer) if name.endswith(AVERAGES) else None
    batch = contestants.make_batch(dist.get_rank())
    for _ in range(2):
        contestants.iterate(model, optimizer, batch)
    result: dict[str, Any] = {"parameter_bytes": size, "idle": count(lambda: time.sleep(0.5))}
    result["step"] = count(lambda: contestants.iterate(model, optimizer, batch))
    contestants.backward(model, batch)
    result["update"] = count(optimizer.step)
    optimizer.zero_grad()
    result["accumulate"] = _accumulation(model, optimizer, batch) if name == "ours" else None
    result["swap"] = None if averages is None else count(lambda: _swap(averages))
    return result


def _swap(averages: ShardedAverages) -> None:
    with averages.averaged_parameters():
        pass


def _accumulation(model: torch.nn.Module, optimizer: Any, batch: torch.Tensor) -> float:
    """Bytes per backward under ``no_sync``; the accumulated gradients are then used, so that the run stays whole."""

    def accumulate() -> None:
        with optimizer.no_sync():
            for _ in range(MICRO_BATCHES):
                contestants.backward(model, batch)

    sent = count(accumulate)
    contestants.iterate(model, optimizer, batch)
    return sent / MICRO_BATCHES


def count(work: Callable[[], object]) -> int:
    """Bytes this rank sends for ``work``: from a quiet link, to when all that was under way has been sent."""
    dist.barrier()
    before = netns.settled_sent_bytes()
    work()
    return netns.settled_sent_bytes() - before


if __name__ == "__main__":
    main()
