"""Processes that end, or are interrupted, while they save: what was begun is finished or not there, nobody hangs."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_asgd import Checkpointer
from dist_asgd.checkpoint import CheckpointError
from dist_asgd.checkpoint.storage.posix import LocalStore
from tests.support.failures import one_message, quick_message
from tests.support.ranks import message_of, run_alone, run_ranks

LIMIT = 60  # seconds
ENDS = {"exit": 3 << 8, "error": 1 << 8, "killed": int(signal.SIGTERM)}  # status as wait() tells it
RANKS = 2


def train(folder, how, rank):
    """Ends by a signal that comes from outside while a save in the background has not written its first byte."""
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    checkpointer, x = Checkpointer(folder / "run"), torch.ones(500_000)
    checkpointer.save(1, {"x": x})
    terminated, write = threading.Event(), LocalStore.write

    def write_later(store, path, chunks):
        terminated.wait()
        time.sleep(0.5)  # the main thread has ended
        return write(store, path, chunks)

    def handler(number, frame):
        terminated.set()
        if how == "exit":
            sys.exit(3)
        raise RuntimeError("terminated")

    LocalStore.write = write_later
    if how != "killed":
        signal.signal(signal.SIGTERM, handler)
    checkpointer.save(2, {"x": x.add_(1)}, wait=False)
    x.add_(1)
    (folder / f"ready{rank}").touch()
    while True:
        time.sleep(0.01)


def run_all(folder):
    """Forks the ranks of all trainings and terminates them; prints how they ended. They end as interpreters do."""
    pids = []
    for how, rank in itertools.product(ENDS, range(RANKS)):
        (folder / how).mkdir(exist_ok=True)
        pids.append(os.fork())
        if not pids[-1]:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            train(folder / how, how, rank)
    while len(list(folder.glob("*/ready*"))) < len(pids):
        time.sleep(0.01)
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    print(*(os.waitpid(pid, 0)[1] for pid in pids))


def loaded(folder):
    state = {"x": torch.zeros(500_000)}
    return Checkpointer(folder).load(state), state["x"].unique().tolist()


def test_sigterm_while_a_save_is_under_way(tmp_path):
    """A process that handles the signal finishes the save; of one that does not, older checkpoints are left."""
    program = (
        "import sys, pathlib; from tests.checkpoint import test_ending; test_ending.run_all(pathlib.Path(sys.argv[1]))"
    )
    paths = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", program, str(tmp_path)]
    said = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, stdout=-1, timeout=LIMIT, text=True)
    assert said.stdout.split() == [str(status) for status in ENDS.values() for _ in range(RANKS)]
    for how in ENDS:
        expected = (1, [1.0]) if how == "killed" else (2, [2.0])
        assert run_alone(loaded, tmp_path / how / "run") == expected, how


def interrupted_while_waiting(folder):
    """The next save must not take the buffer of one that still writes."""
    may_write, write = threading.Event(), LocalStore.write

    def write_later(store, path, chunks):
        may_write.wait()
        return write(store, path, chunks)

    LocalStore.write = write_later
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    checkpointer, x = Checkpointer(folder), torch.ones(1000)
    checkpointer.save(1, {"x": x}, wait=False)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    message_of(lambda: checkpointer.save(2, {"x": x}, wait=False), KeyboardInterrupt)
    threading.Timer(0.5, may_write.set).start()
    checkpointer.save(3, {"x": x + 2}, wait=False)
    checkpointer.close()
    found = {}
    assert checkpointer.load(found, step=1) == 1
    return found["x"].unique().tolist()


def test_a_save_after_one_that_was_interrupted_changes_nothing_of_the_last(tmp_path):
    assert run_alone(interrupted_while_waiting, tmp_path) == [1.0]


def forked_while_saving(folder):
    may_write, write = threading.Event(), LocalStore.write

    def write_later(store, path, chunks):
        may_write.wait()
        return write(store, path, chunks)

    LocalStore.write = write_later
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(1, {"x": torch.ones(1000)}, wait=False)
        worker = multiprocessing.get_context("fork").Process(target=int)
        worker.start()
        worker.join(LIMIT / 4)
        worker.kill()
        may_write.set()
    return worker.exitcode, checkpointer.steps()


def test_a_forked_worker_does_not_wait_for_the_save(tmp_path):
    """As of a DataLoader: it has no thread that could finish."""
    assert run_alone(forked_while_saving, tmp_path) == (0, [1])


class Interrupting:
    """Something with a state, of which rank 1 is interrupted: when it tells the state, or when that is written."""

    def __init__(self, error):
        self.error = error

    def state_dict(self):
        if self.error is not None and dist.get_rank() == 1:
            raise self.error
        return {"x": torch.arange(3 * 2**20)}

    def load_state_dict(self, state):
        pass


def interrupted(rank, folder, error, place):
    checkpointer = Checkpointer(folder)
    write = LocalStore.write

    def write_one(store, path, chunks):
        raise error

    if place == "writing" and rank == 1:
        LocalStore.write = write_one
    state = {"it": Interrupting(error if place == "state" else None)}
    kind = type(error) if rank == 1 and not isinstance(error, OSError) else CheckpointError
    text = quick_message(lambda: checkpointer.save(1, state), kind)
    LocalStore.write = write
    assert checkpointer.steps() == []
    checkpointer.save(2, {"it": Interrupting(None)})
    assert checkpointer.steps() == [2]
    return text


@pytest.mark.parametrize("place", ["state", "writing"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(4), OSError("no")], ids=lambda error: repr(error))
def test_the_others_hear_of_an_interrupted_rank(tmp_path, error, place):
    texts = run_ranks(3, interrupted, tmp_path, error, place)
    one_message([texts[0], texts[2]], "rank 1", "no" if isinstance(error, OSError) else type(error).__name__)
