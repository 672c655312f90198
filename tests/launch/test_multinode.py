"""launch/multinode.sh on hosts with networks of their own: a host dies, and training goes on without it."""

from pathlib import Path

import pytest

from tests.support import netns
from tests.support.elastic_job import elastic_job
from tests.support.network_of_hosts import network


def test_training_goes_on_without_a_host_that_died(tmp_path: Path) -> None:
    if (reason := netns.why_not()) is not None:
        pytest.skip(reason)
    with network(2) as hosts, elastic_job(hosts, tmp_path, steps=100_000, nodes="1:2") as job:
        at = job.wait_for("2 × cpu")
        at = job.wait_for("Saved step 100 ", after=at)
        job.kill(1)
        at = job.wait_for("1 × cpu", after=at)
        job.wait_for(r"Going on from step \d+, saved by 2 ranks", after=at)
