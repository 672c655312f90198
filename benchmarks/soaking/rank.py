"""One rank of launch/train.py that writes a diary: which sequences each step read, what was saved, and when.

    torchrun ... benchmarks/soaking/rank.py FOLDER [options of launch/train.py]

Each process appends JSON lines to a file of its own in FOLDER, one write each, so that SIGKILL loses no finished line.
Beside FOLDER there may be a file `clock`, with seconds (float64) by which this rank's wall clock is wrong, and a folder
`tmp` for temporary files.
"""

import json
import mmap
import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

folder = Path(sys.argv.pop(1))
right_time = time.time  # seconds since the epoch
started = right_time()
diary = open(folder / f"{started:.3f}-{os.getpid()}", "ab", buffering=0)  # noqa: SIM115  # until the process ends


def born() -> float:
    """Returns when this process began, in seconds since the epoch."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return right_time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


def note(event: str, *facts: Any) -> None:
    """Writes the time, the event and its facts as one line."""
    diary.write(json.dumps([right_time(), event, *facts]).encode() + b"\n")


note("start", int(os.environ["RANK"]), born())
if (folder.parent / "tmp").is_dir():
    os.environ["TMPDIR"] = str(folder.parent / "tmp")
if (folder.parent / "clock").is_file():
    with open(folder.parent / "clock", "rb") as file:
        wrong_by = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
    time.time = lambda: right_time() + struct.unpack("d", wrong_by)[0]
sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))  # where the files of launch/ find each other

import checkpoints  # noqa: E402
import data  # noqa: E402
import train  # noqa: E402


def noting(event: str, function: Callable[..., Any], facts: Callable[..., list[Any]]) -> Callable[..., Any]:
    """Wraps `function`: notes `event` after each call, with what `facts` makes of its result and its arguments."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        note(event, *facts(result, *args, **kwargs))
        return result

    return wrapper


def saving(run: Any, progress: Any) -> None:
    """Notes when a save begins and when it has ended."""
    note("saving")
    save(run, progress)
    note("saved", progress.step)


data.sequences = noting("step", data.sequences, lambda _, text, share, *, step, **rest: [step, share.start, share.stop])
train.import_drivers = noting("imported", train.import_drivers, lambda *_: [])
train.join_world = noting("joined", train.join_world, lambda *_: [])
train.make_folders = noting("folders", train.make_folders, lambda *_: [])
train.build_run = noting("built", train.build_run, lambda *_: [])
train.resume = noting("resumed", train.resume, lambda progress, _: [progress.step])
save, checkpoints.save = checkpoints.save, saving
train.main()
