"""launch/multinode.sh on hosts of a network, with a small model: starts and ends hosts, and waits for what they say."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.network_of_hosts import NetworkHost

PORT = 29400
SMALL = "--width 16 --layers 1 --length 16 --batch 12 --held-out-bytes 2000 --max-bytes 100000 --lr 0.5"


@dataclass(frozen=True, slots=True)
class ElasticJob:
    """One training run over hosts, the first of which is the rendezvous. All of them write to one log."""

    hosts: list[NetworkHost]
    folder: Path
    steps: int
    nodes: str  # MIN:MAX
    agents: dict[int, subprocess.Popen[str]] = field(default_factory=dict)

    def start(self, number: int) -> None:
        """Starts the script on a host."""
        python = Path(sys.executable).parent
        environment = {
            "OMP_NUM_THREADS": "1",
            "PATH": f"{python}:/usr/sbin:/usr/bin:/sbin:/bin",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        command = ["bash", "launch/multinode.sh", f"{self.hosts[0].address}:{PORT}", self.nodes, "--nproc-per-node=1"]
        run = f"--out {self.folder} --checkpoint-dir {self.folder}/checkpoints --checkpoint-every 100 --eval-every 100"
        command += ["launch/train.py", *SMALL.split(), *run.split(), f"--steps={self.steps}", "--data", "launch/*.py"]
        with open(self.folder / "log", "a") as log:
            self.agents[number] = self.hosts[number].start(command, log, environment)

    def kill(self, number: int) -> None:
        """Kills all processes of a host."""
        self.hosts[number].kill()
        self.agents.pop(number).wait()

    def text(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def wait_for(self, pattern: str, *, after: int = 0, timeout: float = 180.0) -> int:
        """Waits until the log has `pattern` behind position `after`; returns the position where it ends."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            found = re.compile(pattern).search(self.text(), after)
            if found is not None:
                return found.end()
            if all(agent.poll() is not None for agent in self.agents.values()):
                break
            time.sleep(0.1)
        raise AssertionError(f"the log has no {pattern!r} after {after}: {self.text()[-6000:]}")


@contextmanager
def elastic_job(hosts: list[NetworkHost], folder: Path, *, steps: int, nodes: str) -> Iterator[ElasticJob]:
    """Starts the script on every host; kills what is left at the end."""
    job = ElasticJob(hosts, folder, steps, nodes)
    try:
        for number in range(len(hosts)):
            job.start(number)
        yield job
    finally:
        for number in list(job.agents):
            job.kill(number)
