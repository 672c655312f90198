"""Real bytes on a real link: what one rank sends in one step, counted by the kernel between two network namespaces."""

import json
from typing import Any

import pytest

from tests.support import netns
from tests.support.ranks import run_program

pytestmark = pytest.mark.netns

PARAMETERS = 4e6
NOISE = 4096  # bytes; acknowledgements, ARP: 0 to 132 were seen on an idle link
MICRO_BATCHES = 3  # backward passes that benchmarks.wire counts under no_sync
NAMES = ["ours", "DDP + ours, gradients=reduced", "DDP + ASGD", "DDP + ZeroRedundancyOptimizer"]
Rows = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Rows of ``python -m benchmarks.wire`` by name, all from one run."""
    reason = netns.why_not()
    if reason is not None:
        pytest.skip(reason)
    found = tmp_path_factory.mktemp("wire") / "rows.jsonl"
    run_program("benchmarks.wire", f"--parameters={PARAMETERS}", f"--json={found}", "--names", *NAMES)
    return {row["name"]: row for row in map(json.loads, found.read_text().splitlines())}


def full(row: dict[str, Any]) -> int:
    """2P(N-1)/N bytes for N = 2: each gradient reduced and each parameter distributed once."""
    return row["parameters"] * 4


def test_the_counter_knows_ddp(rows: Rows) -> None:
    """The ruler: DistributedDataParallel's ring all-reduce is known to send 2P(N-1)/N, and nothing in step()."""
    ddp = rows["DDP + ASGD"]
    assert full(ddp) <= ddp["step"] <= 1.06 * full(ddp)
    assert ddp["update"] <= NOISE
    assert ddp["idle"] <= NOISE


def test_a_step_sends_no_more_than_it_must(rows: Rows) -> None:
    ours = rows["ours"]
    assert full(ours) <= ours["step"] <= 1.06 * full(ours)


def test_no_sync_sends_nothing(rows: Rows) -> None:
    ours = rows["ours"]
    assert ours["accumulate"] * MICRO_BATCHES <= NOISE


def test_reduced_gradients_leave_only_the_all_gather(rows: Rows) -> None:
    """Under DDP, which reduces by itself, step() sends P(N-1)/N: the parameters."""
    ours = rows["DDP + ours, gradients=reduced"]
    assert full(ours) / 2 <= ours["update"] <= 1.06 * full(ours) / 2


def test_zero_redundancy_optimizer_sends_half_as_much_again(rows: Rows) -> None:
    """The peer in the same script: its all-reduce is followed by a broadcast of the parameters."""
    assert rows["DDP + ZeroRedundancyOptimizer"]["step"] > 1.3 * rows["ours"]["step"]


def test_namespaces_are_gone_after_a_failure() -> None:
    reason = netns.why_not()
    if reason is not None:
        pytest.skip(reason)
    with pytest.raises(ZeroDivisionError), netns.two_hosts() as hosts:
        assert all(host.namespace in netns.namespaces() for host in hosts)
        raise ZeroDivisionError
    assert not {host.namespace for host in hosts} & netns.namespaces()
