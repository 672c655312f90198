"""Faults that benchmarks.soak puts into a run: each is one function, which returns when the fault is over."""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.soaking.job import FOREVER, Job
from tests.support.stores import Proxy, Server

DISK = 16  # MiB for the temporary files of the ranks


@dataclass(frozen=True)
class Scene:
    """What faults are put into.

    Attributes:
        seconds: the longest that an outage of the store or a full disk lasts.
    """

    job: Job
    server: Server
    proxy: Proxy
    choices: random.Random
    seconds: float

    def rank(self) -> int:
        """Returns the process id of a rank at random, and waits for one between two rounds."""
        while not (ranks := self.job.ranks()):
            time.sleep(0.02)
        return self.choices.choice(ranks)

    def sleep(self) -> None:
        """Sleeps for as long as an outage lasts."""
        time.sleep(self.choices.uniform(0, self.seconds))


def kill(scene: Scene) -> None:
    """SIGKILL to a rank."""
    with suppress(ProcessLookupError):
        os.kill(scene.rank(), signal.SIGKILL)


def stop(scene: Scene) -> None:
    """SIGSTOP to a rank, for ever: the others must give it up, and torchrun must end it."""
    victim = scene.rank()
    with suppress(ProcessLookupError):
        os.kill(victim, signal.SIGSTOP)
        while victim in scene.job.ranks():
            time.sleep(0.1)


def host(scene: Scene) -> None:
    """SIGKILL to torchrun and its ranks; torchrun is started anew."""
    scene.job.kill()
    scene.job.start(FOREVER)


def store_stop(scene: Scene) -> None:
    """SIGSTOP to the store, and SIGCONT."""
    assert scene.server.process is not None
    scene.server.process.send_signal(signal.SIGSTOP)
    scene.sleep()
    scene.server.process.send_signal(signal.SIGCONT)


def store_kill(scene: Scene) -> None:
    """SIGKILL to the store, which is started anew with its files."""
    scene.server.kill()
    scene.sleep()
    while scene.server.process is None:
        with suppress(RuntimeError):  # another process has one of the store's ports at the moment
            scene.server.start()


def refused(scene: Scene) -> None:
    """Connections to the store are closed, and refused for a while."""
    scene.proxy.go_down(FOREVER)
    scene.sleep()
    scene.proxy.refuse = 0


def busy(scene: Scene) -> None:
    """Requests to the store get the status 503 for a while."""
    scene.proxy.busy = FOREVER
    scene.proxy.go_down(0)
    scene.sleep()
    scene.proxy.busy = 0


def reset(scene: Scene) -> None:
    """Some connections to the store are cut in a request, others in an answer."""
    scene.proxy.cut_requests = scene.choices.randint(1, 5)
    scene.proxy.cut_answers = scene.choices.randint(1, 5)
    scene.sleep()


def slow(scene: Scene) -> None:
    """Each piece of a request and of an answer waits for up to a quarter of a second."""
    scene.proxy.delay, scene.proxy.late = scene.choices.uniform(0, 0.25), scene.choices.uniform(0, 0.25)
    scene.sleep()
    scene.proxy.delay = scene.proxy.late = 0.0


def disk(scene: Scene) -> None:
    """The disk for temporary files is full, and a rank is killed, so that all load."""
    hog = scene.job.folder / "tmp" / "hog"
    with suppress(OSError), open(hog, "wb", buffering=0) as file:
        while file.write(bytes(2**16)):
            pass
    kill(scene)
    scene.sleep()
    hog.unlink()


def clock(scene: Scene) -> None:
    """The wall clock of the ranks jumps to a time up to a day away."""
    set_clock(scene.job.folder, scene.choices.uniform(-86400, 86400))


def set_clock(folder: Path, seconds: float) -> None:
    """Has the wall clock of the ranks of a run be wrong by so many seconds."""
    with open(folder / "clock", "r+b") as file:  # ranks have mapped it
        file.write(struct.pack("d", seconds))


def mount(folder: Path) -> str | None:
    """Makes `folder` a disk of `DISK` MiB; returns why not, in words, where that cannot be."""
    folder.mkdir(parents=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    return made.stderr.strip() if made.returncode else None


FAULTS: dict[str, Callable[[Scene], None]] = {
    "kill": kill,
    "stop": stop,
    "host": host,
    "store-stop": store_stop,
    "store-kill": store_kill,
    "refused": refused,
    "busy": busy,
    "reset": reset,
    "slow": slow,
    "disk": disk,
    "clock": clock,
}
