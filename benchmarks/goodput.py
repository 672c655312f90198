"""How much of its time a run trains whose ranks are killed once a minute, and where the rest goes.

    python -m benchmarks.goodput --minutes 20 --every 60

torchrun runs launch/train.py with two ranks and checkpoints in SeaweedFS, an S3 server. A rank at random gets SIGKILL
in the middle of each interval. Goodput is the steps that lasted over those of an undisturbed run in as long a time;
the latter is measured for half of `--undisturbed` minutes before, and for half after.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.soaking.diaries import STEPS, where_time_went
from benchmarks.soaking.job import FOREVER, Job, store
from benchmarks.table import print_table
from tests.support.processes import end_cleanly

MODEL = "--width 128 --layers 4 --length 128 --batch 16 --held-out-bytes 2000 --lr 0.5 --t0 10"
RANKS = 2


def make_job(folder: Path, root: str, args: argparse.Namespace) -> Job:
    """Makes a run that has not started."""
    folder.mkdir()
    options = [*args.model.split(), f"--eval-every={FOREVER}", "--keep-last=3"]
    options += [f"--checkpoint-every={args.checkpoint_every}"]
    return Job(folder, f"{root}/{folder.name}", options, [f"--nproc-per-node={RANKS}", "--max-restarts=1000"])


def newest_step(job: Job, until: float) -> int:
    """Returns the last step that a rank had begun at a time, in seconds since the epoch."""
    return max(event[2] for diary in job.read() for event in diary.events if event[1] == "step" and event[0] < until)


def steps_per_second(job: Job, seconds: float) -> float:
    """Runs a job undisturbed; returns its rate from its first steps on."""
    job.start(FOREVER)
    try:
        job.wait_for("saved")
        time.sleep(1)
        begin = time.time()
        time.sleep(seconds)
        end = time.time()
    finally:
        job.stop()
    return (newest_step(job, end) - newest_step(job, begin)) / (end - begin)


def kill_again_and_again(job: Job, args: argparse.Namespace) -> tuple[float, float, int]:
    """Runs a job and kills its ranks; returns when that began and ended, since the epoch, and the steps that lasted."""
    choices, kills = random.Random(args.seed), round(args.minutes * 60 / args.every)
    job.start(FOREVER)
    try:
        job.wait_for("saved")
        time.sleep(1)
        begin = time.time()
        for kill in range(kills):
            time.sleep(max(begin + (kill + 0.5) * args.every - time.time(), 0))
            while not (ranks := job.ranks()):
                time.sleep(0.01)
            os.kill(choices.choice(ranks), signal.SIGKILL)
            print(f"kill {kill + 1} at step {newest_step(job, time.time())}", file=sys.stderr, flush=True)
        time.sleep(max(begin + kills * args.every - time.time(), 0))
        end = time.time()
    finally:
        job.stop()
    return begin, end, newest_step(job, end) - newest_step(job, begin)


def main() -> None:
    end_cleanly()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--every", type=float, default=60.0, help="seconds from kill to kill")
    parser.add_argument("--undisturbed", type=float, default=2.0, help="minutes")
    parser.add_argument("--checkpoint-every", type=int, default=10, help="steps")
    parser.add_argument("--model", default=MODEL, help="options of launch/train.py (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, store() as (server, _):
        jobs = [make_job(Path(folder) / name, server.root, args) for name in ("before", "killed", "after")]
        rates = [steps_per_second(jobs[0], args.undisturbed * 30)]
        begin, end, steps = kill_again_and_again(jobs[1], args)
        rates.append(steps_per_second(jobs[2], args.undisturbed * 30))
        diaries = jobs[1].read()
    spent = where_time_went(diaries, begin, end)
    rate, whole, kills = sum(rates) / 2, end - begin, sum(diary.rank == 0 for diary in diaries) - 1
    rows = [{"rank 0 was in": k, "s": v, "%": 100 * v / whole, "s a kill": v / kills} for k, v in spent.items()]
    print_table(rows, {key: key for key in rows[0]})
    print(
        f"\n{kills} starts after a kill in {whole:.0f} s; undisturbed {rates[0]:.2f} steps/s before, "
        f"{rates[1]:.2f} after"
    )
    print(
        f"{steps} steps lasted: goodput {100 * steps / (rate * whole):.1f} % (of its time rank 0 spent "
        f"{100 * spent[STEPS] / whole:.1f} % in steps that lasted)"
    )


if __name__ == "__main__":
    main()
