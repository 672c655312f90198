"""Two ranks train while the store of a save in the background does not answer, or is gone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_asgd import Checkpointer, ShardedASGD
from dist_asgd.checkpoint import CheckpointError
from tests.support.stores import Server


class Training:
    """A small model on one of several ranks, with a step that takes about `pause` seconds. Made on every rank."""

    def __init__(self, rows: int, pause: float) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(1024, rows)  # 4 KiB a row
        self.optimizer = ShardedASGD(self.model.named_parameters(), lr=0.1)
        self.state = {"model": self.model, "optimizer": self.optimizer}
        self.pause = pause
        self.steps = 0

    def until(self, is_over: Callable[[], bool]) -> tuple[int, float]:
        """Trains until `is_over` is true on all ranks; returns the steps and the seconds. Collective."""
        began, count = time.monotonic(), 0
        over = torch.zeros(1)
        while not over:
            time.sleep(self.pause)
            self.model(torch.ones(1, 1024)).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            count += 1
            over.fill_(is_over())
            dist.all_reduce(over, dist.ReduceOp.MIN)
        self.steps += count
        return count, time.monotonic() - began


def after(seconds: float) -> Callable[[], bool]:
    """Returns a question that is answered with yes after so many seconds."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def break_store(server: Server, killed: bool) -> None:
    """Stops the store's process by SIGSTOP, or kills it."""
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGKILL if killed else signal.SIGSTOP)


def mend_store(server: Server, killed: bool) -> None:
    """Has the store's process go on, or starts another with the same files, which ends with the calling process."""
    assert server.process is not None
    if killed:
        server.start()
    else:
        os.kill(server.process.pid, signal.SIGCONT)


def train_through_outage(
    rank: int, url: str, server: Server, seconds: float, killed: bool, retry_timeout: float, rows: int, pause: float
) -> dict[str, Any]:
    """Trains, saves in the background, and trains on while the store is broken. Called on every rank.

    Returns:
        What happened: steps and seconds before and in the outage, seconds from its end to that of the save, the
        save's error or "", the error of another save after it, and whether the newest checkpoint has the bits saved.
    """
    training = Training(rows, pause)
    with Checkpointer(url, server.options, retry_timeout=retry_timeout) as checkpointer:
        checkpointer.save(0, training.state)
        training.until(after(0.2))
        before = training.until(after(min(seconds, 5.0)))
        checkpointer.save(1, training.state, wait=False)
        try:
            if rank == 0:
                break_store(server, killed)
            during = training.until(after(seconds))
        finally:
            if rank == 0:
                mend_store(server, killed)
        _, late = training.until(lambda: sum(checkpointer.metrics()[key] for key in ("saves", "failed_saves")) == 2)
        errors = [_error_of(checkpointer.wait), _error_of(lambda: checkpointer.save(2, training.state))]
        loaded = Training(rows, pause)
        step = Checkpointer(url, server.options).load(loaded.state)
        pairs = zip(training.model.parameters(), loaded.model.parameters(), strict=True)
        equal = all(torch.equal(mine, theirs) for mine, theirs in pairs)
        facts = {"before": before, "during": during, "late": late, "save": errors[0], "next": errors[1]}
        return facts | {"newest": step, "equal": equal, "retried": checkpointer.metrics()["retried_requests"]}


def _error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except CheckpointError as error:
        return str(error)
    return ""
