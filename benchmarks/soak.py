"""One training run whose ranks are killed at random again and again: is its end that of a run without faults?

    python -m benchmarks.soak --kills 50 --ranks 2

torchrun runs launch/train.py with checkpoints in SeaweedFS, an S3 server. A rank at random gets SIGKILL, again and
again: in turn up to `--seconds` seconds after the last kill, whatever it does then, and up to so many after a first
step. Afterwards the run is stopped by SIGTERM, goes on for some steps, and ends.
A second run does as many steps undisturbed. Weights, averages and the optimizer's state must have equal bits.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.soaking.diaries import data_faults, read_diaries, repeated_steps, where_time_went
from benchmarks.table import print_table
from tests.support.processes import ROOT, end_cleanly
from tests.support.stores import KEY, SECRET, running, seaweedfs

BATCH, MORE = 12, 20
SMALL = f"--width 16 --layers 1 --length 16 --batch {BATCH} --held-out-bytes 2000 --max-bytes 100000 --lr 0.5 --t0 10"
PATIENCE = 300.0  # seconds that a busy machine may take to start or to end a run
FOREVER = 10**9  # steps


def start(folder: Path, url: str, ranks: int, steps: int, kills: int) -> subprocess.Popen[bytes]:
    """Starts torchrun; its processes write diaries and a log into `folder`."""
    (folder / "diaries").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [f"--max-restarts={2 * kills + 2}", "--monitor-interval=0.1", "benchmarks/soaking/rank.py"]
    command += [str(folder / "diaries"), *SMALL.split(), f"--steps={steps}", f"--eval-every={FOREVER}"]
    command += ["--checkpoint-every=5", f"--out={folder}", f"--checkpoint-dir={url}", "--timeout=60"]
    with open(folder / "log", "ab") as log:
        environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as launch/multinode.sh
        return subprocess.Popen([*command, "--data", "launch/*.py"], stdout=log, stderr=log, cwd=ROOT, env=environment)


def children(agent: subprocess.Popen[bytes]) -> list[int]:
    """Returns the ranks that the agent has at the moment."""
    return [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]


def resources(pid: int) -> dict[str, int]:
    """Returns resident MiB, open descriptors and threads of a process."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    return {"MiB": int(lines["VmRSS"].split()[0]) >> 10, "descriptors": descriptors, "threads": int(lines["Threads"])}


def has_trained(folder: Path, pid: int) -> bool:
    """Whether a rank's diary has a step."""
    return any('"step"' in path.read_text() for path in (folder / "diaries").glob(f"*-{pid}"))


def wait_for_step(agent: subprocess.Popen[bytes], folder: Path) -> None:
    """Waits until one of the ranks of the moment has begun to train."""
    deadline = time.monotonic() + PATIENCE
    while not any(has_trained(folder, pid) for pid in children(agent)):
        if time.monotonic() > deadline or agent.poll() is not None:
            raise RuntimeError(f"no rank trains: {(folder / 'log').read_text()[-4000:]}")
        time.sleep(0.2)


def throw(agent: subprocess.Popen[bytes], folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Kills ranks; returns one row a kill: what the victim had done, and what the agent holds."""
    choices, rows = random.Random(args.seed), []
    while len(rows) < args.kills:
        if len(rows) % 2:
            wait_for_step(agent, folder)
        time.sleep(choices.uniform(0, args.seconds))
        if agent.poll() is not None:
            raise RuntimeError(f"torchrun ended after {len(rows)} kills: {(folder / 'log').read_text()[-4000:]}")
        victims = children(agent)
        if not victims:
            continue  # between two rounds
        victim = choices.choice(victims)
        os.kill(victim, signal.SIGKILL)
        rows.append({"kill": len(rows) + 1, "trained": has_trained(folder, victim), **resources(agent.pid)})
        print(rows[-1], flush=True)
    return rows


def final_state(folder: Path, url: str, steps: int) -> dict[str, Tensor]:
    """Loads the newest checkpoint into one process; returns all tensors of the model and its optimizer by name."""
    sys.path.insert(0, str(ROOT / "launch"))
    import train
    from world import World

    options = [*SMALL.split(), f"--steps={steps}", f"--out={folder}", f"--checkpoint-dir={url}"]
    run = train.build_run(train.parse_args([*options, "--data", "launch/*.py"]), World(0, 1, torch.device("cpu"), None))
    if train.resume(run).step != steps:
        raise RuntimeError(f"the newest checkpoint in {url} is not of step {steps}")
    tensors = {name: param.detach().clone() for name, param in run.model.named_parameters()}
    for average in train.AVERAGES:
        with run.optimizer.averaged_parameters(average):
            tensors |= {f"{name} {average}": p.detach().clone() for name, p in run.model.named_parameters()}
    for key, state in run.optimizer.state_dict()["state"].items():
        tensors |= {f"{key} {name}": torch.as_tensor(getattr(value, "local", value)) for name, value in state.items()}
    return tensors


def ended(agent: subprocess.Popen[bytes], status: int, folder: Path) -> None:
    """Waits for torchrun; raises unless it ends with `status`."""
    found = agent.wait(PATIENCE)
    if found != status:
        raise RuntimeError(f"torchrun ended with {found}, not {status}: {(folder / 'log').read_text()[-4000:]}")


def soak(args: argparse.Namespace, folder: Path, root: str) -> bool:
    """Runs both runs and prints what is found; returns whether all is as it should be."""
    disturbed, undisturbed = folder / "disturbed", folder / "undisturbed"
    agent = start(disturbed, f"{root}/disturbed", args.ranks, FOREVER, args.kills)
    try:
        rows = throw(agent, disturbed, args)
        time.sleep(1)  # until the ranks of the last kill are gone
        wait_for_step(agent, disturbed)
    finally:
        agent.terminate()
        agent.wait(PATIENCE)
    diaries = read_diaries(disturbed / "diaries")
    spent, repeated = where_time_went(diaries), repeated_steps(diaries)
    steps = max(step for diary in diaries for step, *_ in diary.steps) + MORE
    for place in (disturbed, undisturbed):
        ended(start(place, f"{root}/{place.name}", args.ranks, steps, 0), 0, place)
    faults = data_faults(read_diaries(disturbed / "diaries"), args.ranks, BATCH, steps)
    states = [final_state(place, f"{root}/{place.name}", steps) for place in (disturbed, undisturbed)]
    different = [name for name, value in states[0].items() if not torch.equal(value, states[1][name])]
    print_table(rows[:: max(1, len(rows) // 5)], {key: key for key in rows[0]})
    whole = sum(spent.values())
    print_table(
        [{"what": k, "s": v, "%": 100 * v / whole} for k, v in spent.items()], {k: k for k in ("what", "s", "%")}
    )
    trained = sum(row["trained"] for row in rows)
    print(f"{len(rows)} kills, {trained} of a rank that trained; {steps} steps and {repeated} repeated ones")
    print(f"{len(states[0])} tensors compared, different: {different}; faults of the data: {faults}")
    return not different and not faults and states[0].keys() == states[1].keys()


def main() -> None:
    end_cleanly()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10.0, help="a kill falls within so many seconds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, running(seaweedfs()) as server:
        os.environ |= {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ |= {"AWS_ENDPOINT_URL": server.options["endpoint_url"], "OMP_NUM_THREADS": "1"}
        sys.exit(not soak(args, Path(folder), server.root))


if __name__ == "__main__":
    main()
