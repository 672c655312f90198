"""Training over hosts that die, come back and lose their link: seconds until it goes on, as a table.

    python -m benchmarks.hosts

launch/multinode.sh runs on network namespaces as hosts, the first of which is the rendezvous. Needs root and iproute2.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.table import print_table
from tests.support import netns
from tests.support.elastic_job import ElasticJob, elastic_job
from tests.support.network_of_hosts import network
from tests.support.processes import end_cleanly

SAVED = r"Saved step \d+"
PATIENCE = 240.0  # seconds that a busy machine may take to go on


def host_lost(job: ElasticJob, at: int) -> int:
    """A host is killed; the two others go on."""
    job.kill(2)
    at = job.wait_for("2 × cpu", after=at, timeout=PATIENCE)
    return job.wait_for(SAVED, after=at, timeout=PATIENCE)


def host_back(job: ElasticJob, at: int) -> int:
    """The host comes back; all three go on."""
    job.start(2)
    at = job.wait_for("3 × cpu", after=at, timeout=PATIENCE)
    return job.wait_for(SAVED, after=at, timeout=PATIENCE)


def rendezvous_lost(job: ElasticJob, at: int) -> int:
    """The rendezvous host is killed and started again."""
    job.kill(0)
    time.sleep(3)
    job.start(0)
    at = job.wait_for(r"[23] × cpu", after=at, timeout=PATIENCE)
    return job.wait_for(SAVED, after=at, timeout=PATIENCE)


def link_cut(job: ElasticJob, at: int) -> int:
    """A host's link is cut for 5 s."""
    job.hosts[1].cut()
    time.sleep(5)
    job.hosts[1].mend()
    return job.wait_for(SAVED, after=len(job.text()), timeout=PATIENCE)


def link_slow(job: ElasticJob, at: int) -> int:
    """A host's link has 2 Mbit/s until the next checkpoint."""
    job.hosts[1].slow("2mbit")
    at = job.wait_for(SAVED, after=len(job.text()), timeout=PATIENCE)
    job.hosts[1].mend()
    return at


SITUATIONS: tuple[Callable[[ElasticJob, int], int], ...] = (
    link_cut,
    link_slow,
    host_lost,
    host_back,
    rendezvous_lost,
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hosts", description=(__doc__ or "").splitlines()[0])
    parser.parse_args()
    end_cleanly()
    if (reason := netns.why_not()) is not None:
        sys.exit(f"benchmarks.hosts: {reason}")
    rows = []
    with (
        tempfile.TemporaryDirectory() as folder,
        network(3) as hosts,
        elastic_job(hosts, Path(folder), steps=10**7, nodes="2:3") as job,
    ):
        at = job.wait_for("3 × cpu", timeout=PATIENCE)
        at = job.wait_for(SAVED, after=at, timeout=PATIENCE)
        for situation in SITUATIONS:
            began = time.monotonic()
            try:
                at, outcome = situation(job, at), "goes on"
            except AssertionError as error:
                outcome = str(error).partition(":")[0]
                print(error, file=sys.stderr)
            row = {"situation": (situation.__doc__ or "").rstrip("."), "outcome": outcome}
            rows.append(row | {"seconds": f"{time.monotonic() - began:.0f}"})
            print(row, rows[-1]["seconds"], file=sys.stderr, flush=True)
            if outcome != "goes on":
                break
    print_table(rows, {"situation": "situation", "outcome": "outcome", "seconds": "s until the next checkpoint"})


if __name__ == "__main__":
    main()
