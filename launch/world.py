"""The ranks of this run: who am I, which device is mine, and how do all of us agree on something small."""

import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lifeline import Lifeline
from meeting import Meeting

PREEMPTED = 75
"""Exit status of a run that was stopped by a signal and is to be started again: EX_TEMPFAIL of sysexits.h."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None  # a gloo group for small facts on the host; None in a run without torchrun
    patience: timedelta | None = None  # the timeout of its groups; None: torch's own
    lifeline: Lifeline | None = None

    def sum(self, *values: float) -> list[float]:
        """Each of the values added up over the ranks."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, *values: float) -> list[float]:
        """The largest of each of the values."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def from_rank_zero(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on rank 0, on every rank; the others do not call it. If it raises, every rank ends."""
        if self.control is None:
            return make()
        box: list[Any] = [False, None]  # whether it returned, and what
        try:
            if self.rank == 0:
                box = [True, make()]
        finally:
            dist.broadcast_object_list(box, src=0, group=self.control)
        if not box[0]:
            sys.exit(1)  # rank 0 says why
        return box[1]

    def ended_with_others(self) -> contextlib.AbstractContextManager[None]:
        """A block in which a signal ends this rank at once if another rank has ended; see lifeline.py."""
        return contextlib.nullcontext() if self.lifeline is None else self.lifeline.watched()

    def close(self) -> None:
        """Leave the process group, but not while another rank still talks to this one."""
        if self.control is not None:
            dist.barrier(group=self.control)
            dist.destroy_process_group()

    def _reduce(self, values: tuple[float, ...], op: Any) -> list[float]:
        if self.control is None:
            return list(values)
        vector = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(vector, op, group=self.control)
        return vector.tolist()


def join_world(timeout: float) -> World:
    """Join the ranks that torchrun started, or be the only one. Takes GPUs where each rank can have one.

    Args:
        timeout: seconds that a rank waits for the others, to meet and in a collective, before it raises.

    Raises:
        RanksMissing: ranks do not come, or stick on the way.
    """
    gpus = torch.cuda.device_count()
    if "RANK" not in os.environ:
        return World(0, 1, torch.device("cuda" if gpus else "cpu"), None)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local_rank) if gpus >= local_size else torch.device("cpu")
    if gpus and device.type == "cpu" and local_rank == 0:
        print(f"Taking the CPU: NCCL wants a GPU for each rank, and here are {gpus} for {local_size}.", flush=True)
    patience = timedelta(seconds=timeout)
    meeting = Meeting(rank, size, timeout)
    lifeline = Lifeline(rank, size, meeting.host, STOP_SIGNALS)
    ticket = meeting.call_the_roll(lifeline.ticket)
    if rank:
        try:
            lifeline.connect(ticket)
        except OSError as error:
            text = f"Rank {rank} has no connection to rank 0, so it will not learn at once of its end: {error}"
            print(text, file=sys.stderr, flush=True)
    common: dict[str, Any] = {"store": meeting.store, "rank": rank, "world_size": size, "timeout": patience}
    with meeting.connecting("init_process_group"):
        if device.type == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", device_id=device, **common)
        else:
            dist.init_process_group("gloo", **common)
    with meeting.connecting("new_group"):
        control = dist.new_group(backend="gloo", timeout=patience)
    return World(rank, size, device, control, patience, lifeline)


def log_with_rank(world: World, step: Callable[[], int]) -> None:
    """Logs to stderr, from INFO on, in lines that have the rank, its host where there are several, and the step.

    Args:
        world: the ranks.
        step: returns the number of the step that the run is at.
    """
    several = int(os.environ.get("LOCAL_WORLD_SIZE", world.size)) < world.size
    name = f"rank {world.rank}" + (f" on {socket.gethostname()}" if several else "")

    def add(record: logging.LogRecord) -> bool:
        record.where = f"{name}, step {step()}"
        return True

    handler = logging.StreamHandler()
    handler.addFilter(add)
    form = "%(asctime)s %(levelname)s [%(where)s] %(name)s: %(message)s"
    handler.setFormatter(logging.Formatter(form))
    ours = logging.getLogger("dist_asgd")  # not the root: other packages log as they are set up
    ours.handlers = [handler]
    ours.setLevel(logging.INFO)


class StopSignal:
    """Turns the signals of schedulers and of Ctrl-C into a question that all ranks answer alike.

    A signal may reach one rank only, or the ranks at different steps, so none acts on it alone: every rank calls
    `asked` once a step, and it is true on all of them as soon as one has had a signal. Further signals change nothing,
    so they cannot end a save that is under way.
    """

    def __init__(self) -> None:
        self.received = False
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
                signal.signal(number, self._receive)

    def ignore(self) -> None:
        """Ignores the signals until the process has ended, so that none replaces the exit status of this rank.

        Python puts its own handlers back to the default, which ends the process, while it shuts down. torchrun sends a
        signal to the other ranks as soon as one has ended with a status that is not 0.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def asked(self, world: World) -> bool:
        """Whether any rank was told to stop. One all-reduce of one number."""
        return world.max(self.received)[0] > 0

    def _receive(self, number: int, frame: object) -> None:
        self.received = True  # and no more: this runs between any two instructions of the program
