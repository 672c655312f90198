"""What a run of launch/train.py ends with when signals, or saves that fail, stand in its way."""

import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_asgd import Checkpointer
from dist_asgd.checkpoint import CheckpointError
from dist_asgd.checkpoint.saving import save as saving
from dist_asgd.comm import process_groups
from tests.support.processes import free_port
from tests.support.ranks import message_of, run_launched

LAUNCH = Path(__file__).parents[2] / "launch"
sys.path.insert(0, str(LAUNCH))  # where its files find each other

import evaluation  # noqa: E402
import lifeline  # noqa: E402
import meeting  # noqa: E402
import report  # noqa: E402
import train  # noqa: E402
from meeting import RanksMissing  # noqa: E402
from world import PREEMPTED  # noqa: E402

STEPS = 8
PATIENCE = 120  # seconds, on a busy machine


def options(run: Path, *more: str) -> list[str]:
    small = "--width 16 --layers 1 --heads 4 --length 16 --batch 4 --held-out-bytes 200 --max-bytes 5000 --lr 0.5"
    steps = f"--steps {STEPS} --t0 2 --eval-every 2 --checkpoint-every 3"
    places = f"--out {run} --checkpoint-dir {run}/checkpoints --data {LAUNCH}/train.py"
    return [*small.split(), *steps.split(), *places.split(), *more]


def status_of(arguments: list[str]) -> int:
    """Returns the exit status that a rank would have; for use in a rank."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as where the tests do not run under nohup, which has it ignored
    try:
        train.main(arguments)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 0


def finish(run: Path, *more: str) -> list[dict[str, Any]]:
    """Has two ranks go on to the last step; returns the records of the whole run."""
    assert run_launched(2, status_of, options(run, *more), timeout=PATIENCE) == [0, 0]
    return report.read_metrics(str(run))


@pytest.fixture(scope="module", autouse=True)
def without_plots() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "matplotlib", None)  # a plot takes longer than a run
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return finish(tmp_path_factory.mktemp("undisturbed"))


def signalled(function: Callable[..., Any], *signals: int, rank: int | None = None, call: int = 1) -> Any:
    """Wraps a function: the process sends itself signals as its `call`-th call begins, on one rank or on all."""
    calls = 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and rank in (None, int(os.environ["RANK"])):
            for number in signals:
                os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    return wrapper


# Where the signals come: the function that is under way, which signals, on which rank, in which of its calls.
PREEMPTIONS: dict[str, tuple[Any, str, tuple[int, ...], int | None, int]] = {
    "one rank": (train, "train_step", (signal.SIGTERM,), 1, 5),
    "all ranks": (train, "train_step", (signal.SIGINT,), None, 4),
    "twice, in the save": (Checkpointer, "save", (signal.SIGTERM, signal.SIGTERM), 0, 1),
    "in the evaluation": (evaluation, "bits_per_byte", (signal.SIGUSR1,), 1, 2),
    "in the load": (train, "resume", (signal.SIGUSR2,), 0, 1),
    "while the model is built": (train, "build_run", (signal.SIGHUP,), 1, 1),
}


@pytest.mark.parametrize("case", PREEMPTIONS)
def test_a_run_that_a_signal_stops_ends_with_a_status_of_its_own_and_is_resumed_exactly(
    case: str, undisturbed: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, signals, rank, call = PREEMPTIONS[case]
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, signalled(getattr(owner, name), *signals, rank=rank, call=call))
        assert run_launched(2, status_of, options(tmp_path), timeout=PATIENCE) == [PREEMPTED] * 2
    assert len(report.read_metrics(str(tmp_path))) < len(undisturbed)
    assert finish(tmp_path) == undisturbed


def test_a_signal_in_the_last_step_leaves_it_finished(
    undisturbed: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "train_step", signalled(train.train_step, signal.SIGTERM, call=STEPS))
    assert finish(tmp_path) == undisturbed


def test_a_run_without_checkpoints_says_that_nothing_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "train_step", signalled(train.train_step, signal.SIGTERM, call=2))
    assert run_launched(1, status_of, options(tmp_path, "--checkpoint-dir="), timeout=PATIENCE) == [PREEMPTED]
    assert "Stopped by a signal after step 2. Nothing was saved" in capfd.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_ranks_have_met_ends_the_process_at_once(tmp_path: Path, number: int) -> None:
    port = free_port()
    if not (child := os.fork()):
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ.update(ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        try:
            os._exit(status_of(options(tmp_path)))
        finally:
            os._exit(0)  # no pytest in the child; 0 fails the test
    try:
        wait_for_listener(port)
        os.kill(child, number)
        assert status(child) == -number
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        raise


def wait_for_listener(port: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.02)
    raise AssertionError("rank 0 does not wait for the others")


def with_obstacle(train_step: Callable[..., Any], place: Path, steps: range) -> Callable[..., Any]:
    """Wraps `train_step`: in `steps`, a file stands where a directory is at `place`, or a directory where a file is."""
    aside = place.with_name("aside-" + place.name)

    def wrapper(run: train.Run, step: int) -> Any:
        if run.world.rank == 0 and step == steps.start:
            put = place.touch if place.is_dir() else place.mkdir
            place.rename(aside)
            put()
        if run.world.rank == 0 and step == steps.stop:
            place.rmdir() if place.is_dir() else place.unlink()
            aside.rename(place)
        return train_step(run, step)

    return wrapper


def test_training_goes_on_when_checkpoints_and_metrics_cannot_be_written(
    undisturbed: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    steps = range(3, 5)
    for name in ("checkpoints", "metrics.jsonl"):
        monkeypatch.setattr(train, "train_step", with_obstacle(train.train_step, tmp_path / name, steps))
    assert finish(tmp_path, "--checkpoint-every", "1") == undisturbed
    printed = capfd.readouterr().out
    assert "Saving step 3 failed (1 of at most 3 in a row): " in printed and f"{tmp_path}/checkpoints" in printed
    assert "Saving step 4 failed (2 of at most 3 in a row): " in printed
    assert "Saved step 5 in" in printed and printed.count("failed (") == 2


@pytest.mark.parametrize(
    ("saves", "signals", "told"),
    [
        (
            1,
            (),
            r"The training ends after step 4, because 2 saves in a row have failed \(--max-failed-saves 2\); .*/ch",
        ),
        (9, (), rf"The training ends after step {STEPS}, and this step could not be saved; .*/checkpoints"),
        (9, (signal.SIGTERM,), r"The training ends after step 5, and this step could not be saved; .*/checkpoints"),
    ],
    ids=["too many", "the last step", "a signal"],
)
def test_a_save_that_must_not_fail_ends_all_ranks_with_the_reason(
    saves: int, signals: tuple[int, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = with_obstacle(train.train_step, tmp_path / "checkpoints", range(3, STEPS + 1))
    monkeypatch.setattr(train, "train_step", signalled(broken, *signals, rank=1, call=5))
    arguments = options(tmp_path, "--checkpoint-every", str(saves), "--max-failed-saves", "2")

    def ended() -> str:
        os.environ["TORCHELASTIC_ERROR_FILE"] = f"{tmp_path}/error-{os.environ['RANK']}"  # by which torchrun knows
        return message_of(lambda: train.main(arguments), CheckpointError)

    for rank, error in enumerate(run_launched(2, ended, timeout=PATIENCE)):
        assert re.search(told, error)
        assert json.loads((tmp_path / f"error-{rank}").read_text())["message"]["message"] == error


def test_ranks_that_do_not_come_are_named_at_the_timeout(tmp_path: Path) -> None:
    """Rank 0 has the store, so it must not end before the others know."""

    def started_without_the_third() -> str:
        os.environ.update(WORLD_SIZE="3", LOCAL_WORLD_SIZE="3")
        return message_of(lambda: train.main(options(tmp_path, "--timeout", "1")), RanksMissing)

    for told in run_launched(2, started_without_the_third, timeout=PATIENCE):
        assert "rank 2 did not come within 1 s (--timeout)" in told
        assert re.search(rf"rank 0 \(process \d+ on host {socket.gethostname()}\), rank 1 \(process", told)


@pytest.fixture
def two_ranks(tmp_path: Path) -> Iterator[Callable[[Callable[[int], None], str], list[int]]]:
    """Starts ranks 0 and 1 of train.py in children, each after `prepare(rank)`; kills what is left at the end."""
    children: list[int] = []

    def start(prepare: Callable[[int], None], timeout: str) -> list[int]:
        port = free_port()
        for rank in range(2):
            if not (child := os.fork()):
                try:
                    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
                    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
                    prepare(rank)
                    train.main(options(tmp_path, "--timeout", timeout))
                except BaseException as error:
                    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                finally:
                    os._exit(77)
            children.append(child)
        return children

    yield start
    for child in children:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_sticks_while_the_ranks_are_connected_is_named(
    stopped: int, two_ranks: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """torch itself waits without limit where rank 0, which has the store, is stopped."""
    monkeypatch.setattr(meeting, "STUCK", 0.5)
    monkeypatch.setattr(meeting, "ANSWER", 0.5)

    def stops(rank: int) -> None:
        if rank == stopped:
            torch.distributed.new_group = signalled(torch.distributed.new_group, signal.SIGSTOP)

    children = two_ranks(stops, "2")
    status(children[1 - stopped])
    told = capfd.readouterr().err
    assert f"Rank {1 - stopped}: rank {stopped} (process {children[stopped]} on host {socket.gethostname()})" in told


@pytest.mark.parametrize(
    ("owner", "name"), [(saving, "write_blocks"), (process_groups, "_new_group")], ids=["save", "connect"]
)
def test_a_signal_ends_a_rank_at_once_where_another_has_ended(
    owner: Any, name: str, two_ranks: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The signal is torchrun's, which kills what has not ended after 30 s; so would a save give up its peer."""
    monkeypatch.setattr(lifeline, "GRACE", 0.2)

    def loses_rank_one(rank: int) -> None:
        number = signal.SIGKILL if rank else signal.SIGTERM
        setattr(owner, name, signalled(getattr(owner, name), number))

    children = two_ranks(loses_rank_one, "300")
    assert status(children[1]) == -signal.SIGKILL
    assert status(children[0], patience=20) == 1
    assert "Rank 0 ends, and saves nothing" in capfd.readouterr().err


def status(child: int, patience: float = PATIENCE) -> int:
    """Returns the exit status of a child that ends within `patience` seconds."""
    deadline = time.monotonic() + patience
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        assert time.monotonic() < deadline, "still runs"
        time.sleep(0.02)
    return os.waitstatus_to_exitcode(ended[1])
