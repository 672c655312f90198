"""dist-asgd watch: a command for each committed checkpoint, at least once, and never for another."""

import json
import shlex
import sys
import threading

import pytest
import torch

from dist_asgd import Checkpointer
from dist_asgd.cli.main import main

ADD = "import sys; open(sys.argv[1], 'a').write(' '.join(sys.argv[2:]) + '\\n')"
FAIL_ONCE = "import os, sys; done = os.path.exists(sys.argv[1]); open(sys.argv[1], 'w'); sys.exit(0 if done else 3)"


@pytest.fixture
def run(tmp_path):
    """A run with a space in its name, with steps 5 and 10, and what an unfinished save of step 7 leaves."""
    folder = tmp_path / "a run"
    with Checkpointer(folder) as checkpointer:
        for step in (5, 10):
            checkpointer.save(step, {"x": torch.ones(2)})
    unfinished = folder / "step-00000007-0001-0000abcd"
    unfinished.mkdir()
    (unfinished / "rank-0.bin").write_bytes(b"x")
    return folder


def watch(run, code, *words, **options):
    """Runs ``dist-asgd watch`` with a Python program. Returns its exit status."""
    command = shlex.join([sys.executable, "-c", code, *map(str, words)])
    more = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    return main(["watch", str(run), "--exec", command, "--every", "1", *more])


def test_each_committed_checkpoint_once_by_step(run, tmp_path):
    log, state = tmp_path / "log", tmp_path / "state"
    assert watch(run, ADD, log, "{url}", "at={step}", until=5, state=state) == 0
    assert watch(run, ADD, log, "{url}", "at={step}", until=10, state=state) == 0
    urls = [next(run.glob(f"step-*{step}-0001-*")) for step in (5, 10)]
    assert log.read_text() == f"{urls[0]} at=5\n{urls[1]} at=10\n"
    with Checkpointer(run) as checkpointer:
        checkpointer.load({"x": torch.ones(2)})
        checkpointer.save(10, {"x": torch.zeros(2)})
    assert watch(run, ADD, log, "{step}", until=10, state=state) == 0  # a step that is saved again is another one
    assert watch(run, ADD, log, "{step}", until=10, since=5) == 0  # remembers nothing
    assert log.read_text().splitlines()[2:] == ["10", "10"]


def test_a_failure_is_told_and_tried_again(run, tmp_path, capfd):
    state, mark = tmp_path / "state", tmp_path / "mark"
    assert watch(run, FAIL_ONCE, mark, "{url}", until=5, state=state) == 1
    captured = capfd.readouterr()
    assert "step 5: the command ended with status 3" in captured.err and not state.exists()
    assert watch(run, FAIL_ONCE, mark, "{url}", until=5, state=state) == 0
    assert len(json.loads(state.read_text())["done"]) == 1


def test_a_watcher_that_starts_before_the_first_save_sees_it(tmp_path):
    def save():
        with Checkpointer(tmp_path / "run") as checkpointer:
            checkpointer.save(1, {"x": torch.ones(1)})

    timer = threading.Timer(0.3, save)
    timer.start()
    assert watch(tmp_path / "run", ADD, tmp_path / "log", "{step}", until=1) == 0
    timer.join()
    assert (tmp_path / "log").read_text() == "1\n"


@pytest.mark.parametrize(
    ("command", "message"),
    [("'", "cannot be split"), (" ", "is empty"), ("no-such-program {url}", "no program 'no-such-program'")],
)
def test_commands_that_cannot_be_run(run, capsys, command, message):
    assert main(["watch", str(run), "--exec", command]) == 2
    assert message in capsys.readouterr().err


def test_state_of_something_else(run, tmp_path, capsys):
    state = tmp_path / "state"
    for text, message in (("no", "is not a file that"), ('{"url": "/other", "done": []}', "is of the run /other")):
        state.write_text(text)
        assert watch(run, ADD, state=state) == 2 and message in capsys.readouterr().err
