"""A store that is gone for a minute while a save in the background writes to it: what of the training and of the save?

    python -m benchmarks.outage --seconds 60

Two ranks train and save to SeaweedFS, an S3 server, whose process is stopped by SIGSTOP, or killed and started anew
with its files, as soon as the save has begun. Each is done with a longer and with a shorter `retry_timeout`.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from benchmarks.table import print_table
from tests.support.outages import train_through_outage
from tests.support.processes import end_cleanly
from tests.support.ranks import run_ranks
from tests.support.stores import running, seaweedfs

ROWS, PAUSE = 8192, 0.05  # 32 MiB of parameters; seconds that a step takes at least


def outage(seconds: float, killed: bool, retry_timeout: float) -> dict[str, Any]:
    """Runs one outage; returns a row."""
    with running(seaweedfs()) as server:
        arguments = (server.new_url(), server, seconds, killed, retry_timeout, ROWS, PAUSE)
        found = run_ranks(2, train_through_outage, *arguments, timeout=10 * seconds + 300)[0]
    (steps, time), (steps_during, time_during) = found["before"], found["during"]
    return {
        "store": "killed, started anew" if killed else "stopped",
        "retry_timeout": retry_timeout,
        "before": steps / time,
        "in": steps_during / time_during,
        "late": found["late"],
        "save": found["save"] or "succeeds",
        "next": found["next"] or "succeeds",
        "equal": str(found["newest"] == 2 and found["equal"]),
    }


def main() -> None:
    end_cleanly()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of an outage")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = []
    for killed in (False, True):
        for retry_timeout in (5 * args.seconds, args.seconds / 4):
            rows.append(outage(args.seconds, killed, retry_timeout))
            print(rows[-1], flush=True)
    columns = {"store": "store", "retry_timeout": "retry_timeout, s", "before": "steps/s before", "in": "steps/s in it"}
    columns |= {"late": "s from its end to the save's", "save": "that save", "next": "the next", "equal": "equal bits"}
    print_table(rows, columns)


if __name__ == "__main__":
    main()
