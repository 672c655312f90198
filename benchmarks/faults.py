"""Damage in every kind of file of a checkpoint: is it refused, on every rank, before anything live has changed?

    python -m benchmarks.faults --faults 1000

Two checkpoints of the same layout are saved by 2 ranks. A fault is put into a copy of one of them, at a random place of
a random kind of file or part of a file, and 1 and 2 ranks load it into state that has other values. Of each load:

- refused: every rank raised CheckpointError;
- named: the message has the name of the file, and of a damaged tensor the key;
- unchanged: parameters, averages, tensors and values are what they were, bit for bit, on every rank.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.table import print_table, write_json_lines
from dist_asgd.kernels.cpu import native_update
from dist_asgd.kernels.scan import LayoutScan
from dist_asgd.kernels.tensor_list import UpdateKind
from tests.support.faults import (
    CHECKS,
    find,
)

# Faults.


# Loads.


# All of it.


COLUMNS = {"damage": "damage", "place": "in", "faults": "faults"} | {name: name for name in CHECKS}


def summary(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    lines = []
    for damage, place in [*sorted({(row["damage"], row["place"]) for row in found}), ("all", "")]:
        mine = [row for row in found if damage == "all" or (row["damage"], row["place"]) == (damage, place)]
        counts = {name: sum(row[name] for row in mine) for name in CHECKS}
        lines.append({"damage": damage, "place": place, "faults": len(mine), **counts})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("faults.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    native_update(UpdateKind(torch.float32, torch.float32, False, torch.float32, False))  # compiled once, for all ranks
    LayoutScan.of([], [], torch.zeros(0))
    found = find(arguments.faults, arguments.seed)
    print(f"{len(found)} faults, seed {arguments.seed}\n")
    print_table(summary(found), COLUMNS)
    write_json_lines(arguments.json, found)
    if not all(row[name] for row in found for name in CHECKS):
        sys.exit("not every fault was refused as it should be")


if __name__ == "__main__":
    main()
