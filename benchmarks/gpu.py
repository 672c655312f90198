"""The update on a GPU, ours beside torch.optim's: first the bits, then time, launches and synchronisations of a step.

    python -m benchmarks.gpu --sizes 300x3333333 10000x100000

A size is the number of parameters x the elements of each, fp32. Gradients lie in ``p.grad``, averaging is on. Times are
medians, by CUDA events. ``GB/s`` counts the 20 bytes that the update must move for each element: it reads parameter,
gradient and average, and writes parameter and average. SGD with momentum moves as many. What is
"replayed" is a CUDA graph of a step.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim import ASGD, SGD, Optimizer
from torch.profiler import ProfilerActivity, profile

from benchmarks.table import print_table, write_json_lines
from benchmarks.update import size
from dist_asgd import ShardedASGD

COLUMNS = {
    "size": "parameters x elements",
    "contestant": "optimizer",
    "ms": "step, ms",
    "gb_per_s": "GB/s",
    "of_copy": "of device copy",
    "over_ours": "time/ours",
    "launches": "launches",
    "synchronisations": "synchronisations",
}
BYTES = 20  # an element
WARMUP = 3  # steps; averaging starts with the second
CHECKED = 30  # steps
GIB = 2**30
CONTESTANTS: dict[str, Callable[[list[torch.nn.Parameter]], Any]] = {  # what has a step()
    # Parameters of one bucket are updated by one launch. The default is 64 MiB on a GPU; 8 GiB take all parameters.
    "ours": lambda params: ShardedASGD(params, lr=1e-3, t0=0, bucket_bytes=8 * GIB),
    "ours, buckets of 64 MiB": lambda params: ShardedASGD(params, lr=1e-3, t0=0),
    "ours(capturable), replayed": lambda params: _Replayed(ShardedASGD, params, bucket_bytes=8 * GIB),
    "ASGD(foreach=False)": lambda params: ASGD(params, lr=1e-3, t0=0, foreach=False),
    "ASGD(foreach=True)": lambda params: ASGD(params, lr=1e-3, t0=0, foreach=True),
    "ASGD(capturable), replayed": lambda params: _Replayed(ASGD, params, foreach=True),
    "SGD(momentum, fused)": lambda params: SGD(params, lr=1e-3, momentum=0.9, fused=True),
}


class _Replayed:
    """A step in a CUDA graph."""

    def __init__(self, optimizer: type[Optimizer], params: list[torch.nn.Parameter], **options: Any) -> None:
        self._optimizer = optimizer(params, lr=1e-3, t0=0, capturable=True, **options)  # type: ignore[call-arg]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                self._optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._optimizer.step()
        self.step = graph.replay


def main() -> None:
    options = _arguments()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu needs a CUDA GPU, and torch.cuda.is_available() is False here")
    check()
    copy = copy_bandwidth()
    rows = [row for count, numel in options.sizes for row in _rows(count, numel, options.steps, copy)]
    versions = f"torch {torch.__version__}, {torch.cuda.get_device_name()}"
    print(f"\nfp32, averaging on, median of {options.steps} steps, device copy {copy:.0f} GB/s; {versions}\n")
    print_table(rows, COLUMNS)
    write_json_lines(options.json, rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    sizes = [(300, 3_333_333), (10_000, 100_000)]
    parser.add_argument("--sizes", type=size, nargs="+", default=sizes, metavar="COUNTxELEMENTS")
    parser.add_argument("--steps", type=int, default=15, help="timed ones of each contestant")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("gpu.jsonl"), metavar="FILE")
    return parser.parse_args()


def check() -> None:
    """Stops unless parameters and averages have the bits of ``torch.optim.ASGD(foreach=False)``."""
    ours, theirs = _parameters(100, 12_345), _parameters(100, 12_345)
    optimizers = [ShardedASGD(ours, lr=0.1, t0=5, weight_decay=0.1)]
    optimizers.append(ASGD(theirs, lr=0.1, t0=5, weight_decay=0.1, foreach=False))
    for step in range(CHECKED):
        for own, their in zip(ours, theirs, strict=True):
            own.grad = their.grad = torch.randn_like(their)
        for optimizer in optimizers:
            optimizer.step()
        pairs = [(own, their) for own, their in zip(ours, theirs, strict=True)]
        pairs += [(optimizers[0].state[own]["ax"], optimizers[1].state[their]["ax"]) for own, their in pairs]
        wrong = sum(not torch.equal(own, their) for own, their in pairs)
        if wrong:
            raise SystemExit(f"{wrong} of {len(pairs)} tensors differ from torch.optim.ASGD's after step {step + 1}")
    print(f"the bits of torch.optim.ASGD(foreach=False) over {CHECKED} steps of {len(ours)} parameters")


def copy_bandwidth() -> float:
    """Of a copy of 4 GiB on the device, in GB/s, counting what is read and what is written."""
    source = torch.randn(GIB, device="cuda")
    target = torch.empty_like(source)
    times = [_timed(lambda: target.copy_(source)) for _ in range(WARMUP + 20)]
    return 2 * 4 * GIB / statistics.median(times[WARMUP:]) / 1e6


def _rows(count: int, numel: int, steps: int, copy: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, build in CONTESTANTS.items():  # one by one: each needs 12 bytes an element, foreach 8 more
        optimizer = build(_parameters(count, numel))
        times = [_timed(optimizer.step) for _ in range(WARMUP + steps)]
        ms = statistics.median(times[WARMUP:])
        bandwidth = BYTES * count * numel / ms / 1e6
        rows.append(
            {
                "size": f"{count:,} x {numel:,}",
                "contestant": name,
                "ms": round(ms, 3),
                "gb_per_s": round(bandwidth),
                "of_copy": round(bandwidth / copy, 2),
                "over_ours": round(ms / rows[0]["ms"], 2) if rows else 1.0,
                "launches": _launches(optimizer),
                "synchronisations": _synchronisations(optimizer),
                "copy_gb_per_s": round(copy),
                "milliseconds": times[WARMUP:],
            }
        )
        del optimizer
        torch.cuda.empty_cache()
    return rows


def _parameters(count: int, numel: int) -> list[torch.nn.Parameter]:
    """With gradients, which every step uses again."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(numel, device="cuda")) for _ in range(count)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def _timed(work: Callable[[], Any]) -> float:
    """Milliseconds, those in which the device waits for the host as well."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _launches(optimizer: Any) -> int:
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        optimizer.step()
        torch.cuda.synchronize()
    on_device = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device)


def _synchronisations(optimizer: Any) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
    # torch also warns once that the mode is a prototype.
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


if __name__ == "__main__":
    main()
