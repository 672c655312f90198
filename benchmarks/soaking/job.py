"""A run of launch/train.py under torchrun that writes diaries: how it is started, watched, ended and read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.soaking.diaries import Diary, read_diaries
from tests.support.processes import ROOT
from tests.support.stores import KEY, SECRET, Proxy, Server, proxied, running, seaweedfs

PATIENCE = 300.0  # seconds that a busy machine may take to start or to end a run
FOREVER = 10**9  # steps


@dataclass
class Job:
    """One run: its processes are torchrun's agent and the ranks, which may change.

    Attributes:
        folder: for diaries, the log and what else the run writes.
        url: of the checkpoints.
        options: of launch/train.py.
        torchrun: options of torchrun.
    """

    folder: Path
    url: str
    options: Sequence[str]
    torchrun: Sequence[str]
    agent: subprocess.Popen[bytes] | None = None

    def start(self, steps: int) -> None:
        """Starts torchrun."""
        self.diaries.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--monitor-interval=0.1"]
        command += [*self.torchrun, "benchmarks/soaking/rank.py", str(self.diaries), *self.options, f"--steps={steps}"]
        command += [f"--out={self.folder}", f"--checkpoint-dir={self.url}", "--data", "launch/*.py"]
        environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as multinode.sh
        environment["PYTHONPYCACHEPREFIX"] = str(self.folder.parent / "bytecode")  # users have bytecode; checkouts not
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        with open(self.folder / "log", "ab") as log:
            self.agent = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=environment)

    @property
    def diaries(self) -> Path:
        return self.folder / "diaries"

    def read(self) -> list[Diary]:
        """Reads the diaries of all processes so far."""
        return read_diaries(self.diaries)

    def log(self) -> str:
        """Returns the end of what all processes have printed."""
        return (self.folder / "log").read_text(errors="replace")[-4000:]

    def ranks(self) -> list[int]:
        """Returns the process ids of the ranks of the moment; none between two rounds."""
        assert self.agent is not None
        if self.agent.poll() is not None:
            raise RuntimeError(f"torchrun ended with {self.agent.returncode}: {self.log()}")
        return [int(pid) for pid in Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children").read_text().split()]

    def has(self, event: str, pid: int) -> bool:
        """Whether the diary of a rank has an event."""
        return any(f'"{event}"' in path.read_text() for path in self.diaries.glob(f"*-{pid}"))

    def wait_for(self, event: str) -> None:
        """Waits until the diary of one of the ranks of the moment has an event."""
        deadline = time.monotonic() + PATIENCE
        while not any(self.has(event, pid) for pid in self.ranks()):
            if time.monotonic() > deadline:
                raise RuntimeError(f"no rank has got to {event!r} in {PATIENCE:.0f} s: {self.log()}")
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL to the agent and all ranks, as where a host dies."""
        assert self.agent is not None
        os.kill(self.agent.pid, signal.SIGSTOP)  # so that it starts no other ranks meanwhile
        for pid in [*self.ranks(), self.agent.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.agent.wait()

    def stop(self) -> None:
        """SIGTERM to torchrun, which ends all."""
        if self.agent is not None:
            self.agent.terminate()
            self.agent.wait(PATIENCE)

    def run_to(self, steps: int) -> None:
        """Starts torchrun and waits until the last step is done."""
        self.start(steps)
        assert self.agent is not None
        if (found := self.agent.wait(PATIENCE)) != 0:
            raise RuntimeError(f"torchrun ended with {found}: {self.log()}")

    def final_state(self, steps: int) -> dict[str, Tensor]:
        """Loads the newest checkpoint into this process; returns all tensors of model and optimizer by name."""
        sys.path.insert(0, str(ROOT / "launch"))
        import train
        from world import World

        options = [*self.options, f"--steps={steps}", f"--out={self.folder}", f"--checkpoint-dir={self.url}"]
        world = World(0, 1, torch.device("cpu"), None)
        run = train.build_run(train.parse_args([*options, "--data", "launch/*.py"]), world)
        if train.resume(run).step != steps:
            raise RuntimeError(f"the newest checkpoint in {self.url} is not of step {steps}")
        tensors = {name: param.detach().clone() for name, param in run.model.named_parameters()}
        for average in train.AVERAGES:
            with run.optimizer.averaged_parameters(average):
                tensors |= {f"{name} {average}": p.detach().clone() for name, p in run.model.named_parameters()}
        for key, state in run.optimizer.state_dict()["state"].items():
            tensors |= {
                f"{key} {name}": torch.as_tensor(getattr(value, "local", value)) for name, value in state.items()
            }
        return tensors


def resources(pid: int) -> dict[str, int]:
    """Returns resident MiB, open descriptors and threads of a process."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    return {"MiB": int(lines["VmRSS"].split()[0]) >> 10, "descriptors": descriptors, "threads": int(lines["Threads"])}


@contextmanager
def store() -> Iterator[tuple[Server, Proxy]]:
    """Yields a running SeaweedFS and a proxy in front of it, which this process and its children use for s3://."""
    with running(seaweedfs()) as server, proxied(server) as (proxy, options):
        os.environ |= {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ |= {"AWS_ENDPOINT_URL": options["endpoint_url"], "OMP_NUM_THREADS": "1"}
        yield server, proxy
