"""README's plot, of what update, network and memory have written beside this file.

    python -m benchmarks.update && python -m benchmarks.network && python -m benchmarks.memory
    python -m benchmarks.plot docs/figures.svg

Needs matplotlib: the extra "train".
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent
OURS, PEERS = "#c2410c", "#9ca3af"
STEPS = {"ours": "ours", "for_loop": "ASGD for-loop", "foreach": "ASGD foreach", "floor": "SGD momentum, fused"}
SIZE = "1 x 100,000,000"
RANKS = 4


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="to write: .svg, .png or .pdf")
    file = parser.parse_args().file
    matplotlib.rcParams["svg.hashsalt"] = "dist_asgd"  # the same figures make the same file
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _bars(left, "100 M fp32, one process, averaging:\nms per step()", _steps())
    _bars(middle, "27 M fp32, 2 hosts, 1 Gbit/s:\nms per iteration", _iterations())
    _bars(right, f"27 M fp32, {RANKS} ranks:\npeak MiB per rank", _peaks())
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def _rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text().splitlines()]


def _steps() -> dict[str, float]:
    row = next(row for row in _rows("update") if (row["size"], row["phase"]) == (SIZE, "averaging"))
    return {label: row[key] for key, label in STEPS.items()}


def _iterations() -> dict[str, float]:
    return {row["name"]: row["median_ms"] for row in _rows("network") if row["rate"] == "1gbit"}


def _peaks() -> dict[str, float]:
    return {row["name"]: row["peak"] / 2**20 for row in _rows("memory") if row["ranks"] == RANKS}


def _bars(axes: Axes, title: str, values: Mapping[str, float]) -> None:
    names = list(reversed(values))  # barh begins below
    bars = axes.barh(
        names, [values[name] for name in names], color=[OURS if "ours" in name else PEERS for name in names]
    )
    axes.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=7)
    axes.set_title(title, fontsize=9, loc="left")
    axes.tick_params(labelsize=7)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
