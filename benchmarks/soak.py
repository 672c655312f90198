"""One training run with faults again and again: is its end that of a run without faults?

    python -m benchmarks.soak --faults 50 --ranks 2
    python -m benchmarks.soak --faults 50 --kinds kill

torchrun runs launch/train.py with checkpoints in SeaweedFS, an S3 server behind a proxy. Faults of all kinds come in
random order: in turn up to `--seconds` seconds after the last one, whatever the ranks do then, and up to so
many after a first step. Afterwards the run is stopped by SIGTERM, goes on for some steps, and ends.
A second run does as many steps undisturbed. Weights, averages and the optimizer's state must have equal bits.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.soaking.diaries import data_faults, repeated_steps, where_time_went
from benchmarks.soaking.faults import FAULTS, Scene, mount
from benchmarks.soaking.job import FOREVER, Job, resources, store
from benchmarks.table import print_table
from tests.support.processes import end_cleanly

BATCH, MORE = 12, 20
SMALL = f"--width 16 --layers 1 --length 16 --batch {BATCH} --held-out-bytes 2000 --max-bytes 100000 --lr 0.5 --t0 10"


def make_job(folder: Path, url: str, args: argparse.Namespace) -> Job:
    """Makes a run that has not started, with a clock and a disk of its own for its ranks."""
    options = [*SMALL.split(), f"--eval-every={FOREVER}", "--checkpoint-every=5", f"--timeout={args.timeout}"]
    job = Job(folder, url, options, [f"--nproc-per-node={args.ranks}", f"--max-restarts={10 * args.faults + 10}"])
    folder.mkdir()
    (folder / "clock").write_bytes(bytes(8))
    if "disk" in args.kinds and (why := mount(folder / "tmp")) is not None:
        sys.exit(
            f"benchmarks.soak: no disk of its own for the fault 'disk': {why}. Leave it out of --kinds, or be root"
        )
    return job


def throw(scene: Scene, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Puts faults into the run; returns one row a fault: its kind, and what the agent and the oldest rank hold."""
    rows: list[dict[str, Any]] = []
    kinds = [args.kinds[number % len(args.kinds)] for number in range(args.faults)]
    scene.choices.shuffle(kinds)
    for kind in kinds:
        if len(rows) % 2:
            scene.job.wait_for("step")
        time.sleep(scene.choices.uniform(0, args.seconds))
        row = {"fault": len(rows) + 1, "kind": kind, **held(scene.job)}
        print(time.strftime("%H:%M:%S"), row, flush=True)
        began = time.monotonic()
        FAULTS[kind](scene)
        rows.append(row | {"s": time.monotonic() - began})
    return rows


def held(job: Job) -> dict[str, Any]:
    """Returns what the agent, and one of the ranks if there are any, hold of the machine, and the rank's age in s."""
    assert job.agent is not None
    found: dict[str, Any] = {f"agent {name}": value for name, value in resources(job.agent.pid).items()}
    found |= dict.fromkeys(("rank age", "rank MiB", "rank descriptors", "rank threads"))
    with suppress(IndexError, OSError, KeyError):  # between two rounds, or a process that ends
        rank = job.ranks()[0]
        age = time.time() - Path(f"/proc/{rank}").stat().st_mtime
        found |= {"rank age": round(age)} | {f"rank {name}": value for name, value in resources(rank).items()}
    return found


def soak(args: argparse.Namespace, folder: Path) -> bool:
    """Runs both runs and prints what is found; returns whether all is as it should be."""
    with store() as (server, proxy):
        jobs = [make_job(folder / name, f"{server.root}/{name}", args) for name in ("disturbed", "undisturbed")]
        disturbed = jobs[0]
        disturbed.start(FOREVER)
        try:
            rows = throw(Scene(disturbed, server, proxy, random.Random(args.seed), args.seconds), args)
            time.sleep(1)  # until the ranks of the last fault are gone
            disturbed.wait_for("step")
        finally:
            disturbed.stop()
        diaries = disturbed.read()
        spent, repeated = where_time_went(diaries), repeated_steps(diaries)
        steps = max(step for diary in diaries for step, *_ in diary.steps) + MORE
        for job in jobs:
            job.run_to(steps)
        faults = data_faults(disturbed.read(), args.ranks, BATCH, steps)
        states = [job.final_state(steps) for job in jobs]
    different = [name for name, value in states[0].items() if not torch.equal(value, states[1][name])]
    print_table(rows, {key: key for key in rows[0]})
    whole = sum(spent.values())
    print_table(
        [{"what": k, "s": v, "%": 100 * v / whole} for k, v in spent.items()], {k: k for k in ("what", "s", "%")}
    )
    print(f"{len(rows)} faults on {args.ranks} ranks; {steps} steps and {repeated} repeated ones")
    print(f"{len(states[0])} tensors compared, different: {different}; faults of the data: {faults}")
    return not different and not faults and states[0].keys() == states[1].keys()


def main() -> None:
    end_cleanly()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--kinds", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10.0, help="a fault comes within so many, and lasts as many")
    parser.add_argument("--timeout", type=float, default=60.0, help="that of launch/train.py")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            is_right = soak(args, Path(folder))
        finally:
            for disk in Path(folder).glob("*/tmp"):
                subprocess.run(["umount", "--lazy", str(disk)], check=False)
    sys.exit(not is_right)


if __name__ == "__main__":
    main()
