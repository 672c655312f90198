"""One rank of launch/train.py that writes a diary: which sequences each step read, what was saved, and when.

    torchrun ... benchmarks/soaking/rank.py FOLDER [options of launch/train.py]

Each process appends JSON lines to a file of its own in FOLDER, one write each, so that SIGKILL loses no finished line.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

folder = Path(sys.argv.pop(1))
started = time.time()
diary = open(folder / f"{started:.3f}-{os.getpid()}", "ab", buffering=0)  # noqa: SIM115  # until the process ends


def note(event: str, *facts: Any) -> None:
    """Writes the time, the event and its facts as one line."""
    diary.write(json.dumps([time.time(), event, *facts]).encode() + b"\n")


note("start", int(os.environ["RANK"]))
sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))  # where the files of launch/ find each other

import data  # noqa: E402
import train  # noqa: E402


def noting(event: str, function: Callable[..., Any], facts: Callable[..., list[Any]]) -> Callable[..., Any]:
    """Wraps `function`: notes `event` after each call, with what `facts` makes of its result and its arguments."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        note(event, *facts(result, *args, **kwargs))
        return result

    return wrapper


data.sequences = noting("step", data.sequences, lambda _, text, share, *, step, **rest: [step, share.start, share.stop])
train.save = noting("saved", train.save, lambda _, run, progress: [progress.step])
train.join_world = noting("joined", train.join_world, lambda *_: [])
train.resume = noting("resumed", train.resume, lambda progress, _: [progress.step])
note("imported")
train.main()
