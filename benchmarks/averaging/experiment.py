"""What the experiments share: options, ranks over gloo, the comparison of numbers of ranks, and plots."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.table import print_table
from tests.support.processes import free_port, report, start_ranks

FOLDER = Path(__file__).parent
TIMEOUT = 3600.0  # seconds that the ranks have: on a busy machine too


@dataclass(frozen=True, slots=True)
class Curve:
    """A line of a plot."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    style: str = "-"  # as matplotlib has it


def parser_of(description: str, name: str) -> argparse.ArgumentParser:
    """The options that all experiments have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=FOLDER / f"{name}.jsonl", metavar="FILE")
    parser.add_argument("--plot", type=Path, default=FOLDER / f"{name}.svg", metavar="FILE")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def on_ranks(name: str, ranks: int, *arguments: str) -> dict[str, Any]:
    """Run the experiment of this name on so many ranks; returns what rank 0 reports."""
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    module, command = f"benchmarks.averaging.{name}", ["--worker", *arguments]
    started = time.monotonic()
    result = start_ranks(module, command, prefixes=[[]] * ranks, environment=environment, timeout=TIMEOUT)[0]
    figures = ", ".join(f"{key} {value:.6g}" for key, value in result.items() if isinstance(value, float))
    print(f"{ranks} ranks, {' '.join(arguments)}, {time.monotonic() - started:.0f} s: {figures}", flush=True)
    return result


def as_rank(measure: Callable[[], Mapping[str, Any]]) -> None:
    """The worker's part: join the other ranks, measure, report."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    report(measure())
    dist.barrier()
    dist.destroy_process_group()


def share_of(batch: int) -> slice:
    """Which rows of a global batch are this rank's. All ranks have as many, so that means of means are means."""
    if batch % dist.get_world_size():
        raise SystemExit(f"a global batch of {batch} cannot be shared equally by {dist.get_world_size()} ranks")
    rows = batch // dist.get_world_size()
    return slice(dist.get_rank() * rows, (dist.get_rank() + 1) * rows)


def compare_ranks(results: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    """Print the largest difference that the number of ranks makes to any of the figures."""
    if len(results) > 1:
        spread = max(max(r[key] for r in results) - min(r[key] for r in results) for key in keys)
        print(f"the number of ranks changes figures by {spread:.1e} at most")


def print_figures(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], formats: Mapping[str, str]) -> None:
    """As ``print_table``; ``formats`` maps keys to how their numbers are written: ``".4f"``."""
    print_table([{**row, **{key: _written(row[key], how) for key, how in formats.items()}} for row in rows], columns)


def _written(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)


def draw(path: Path, curves: Sequence[Curve], **axes: Any) -> None:
    """Write an SVG of the curves; ``axes`` are the properties of matplotlib's axes. Without matplotlib, say so."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so there is no plot: pip install 'dist-asgd[bench]'")
        return
    # Text as text keeps the file small; a fixed salt and no date keep it the same from run to run.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": path.name})
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    plot = figure.subplots()
    for curve in curves:
        plot.plot(curve.x, curve.y, curve.style, color=curve.color, label=curve.label, linewidth=1.5)
    plot.set(**axes)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    plot.grid(alpha=0.3)
    figure.savefig(path, format="svg", metadata={"Date": None})
    print(f"plotted in {path}")
