"""Checkpoints of stock `torch.distributed.checkpoint` at any fsspec URL.

Every rank writes what it owns, and any number of ranks reads it. A checkpoint is a directory, `step-00000300`, that is
never written to again. The marker in it is written last, when every rank has saved: a directory without one is what a
killed run left behind, and does not count.
"""

import contextlib
import itertools
import json
import posixpath
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch.distributed.checkpoint as dcp
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

from world import World

MARKER = "complete.json"
NAME = re.compile(r"step-\d+(-\d+)?")

State = dict[str, Any]  # tensors, whole or this rank's share of them, in nested dicts
Facts = dict[str, Any]  # what fits in JSON


def save(root: str, step: int, state: State, facts: Facts, world: World) -> str:
    """Write `state` to a new directory below `root`, then `facts` as its marker; returns its URL. Collective."""
    url = world.from_rank_zero(lambda: _new_directory(root, step))
    fs, path = url_to_fs(url)
    # FsspecWriter's sync_files calls os.sync(), which flushes every disk of the machine. A local file needs fsync only.
    writer = dcp.FileSystemWriter(path) if _is_local(fs) else FsspecWriter(url, sync_files=False)
    with _meant_to_be_alone():
        dcp.save(state, storage_writer=writer, process_group=world.control, no_dist=world.control is None)
    marker = json.dumps({"step": step, **facts}, indent=1).encode()
    # dcp.save has returned, so every rank has written everything: the ranks exchange their results in it.
    world.from_rank_zero(lambda: fs.pipe_file(posixpath.join(path, MARKER), marker))
    return url


def load(url: str, state: State, world: World) -> None:
    """Read a checkpoint into the tensors of `state`; what is no tensor is replaced. Collective."""
    fs, path = url_to_fs(url)
    reader = dcp.FileSystemReader(path) if _is_local(fs) else FsspecReader(url)
    with _meant_to_be_alone():
        dcp.load(state, storage_reader=reader, process_group=world.control, no_dist=world.control is None)


def find(root: str, resume: str, world: World) -> tuple[str, Facts] | None:
    """The URL and the facts of the checkpoint to go on from, the same on every rank.

    Args:
        root: where `save` puts checkpoints; may be empty.
        resume: "auto" for the newest complete one below `root`, if there is one; or its URL.
    """
    return world.from_rank_zero(lambda: _find(root, resume))


def _find(root: str, resume: str) -> tuple[str, Facts] | None:
    newest = _newest(root) if root else None
    if resume == "auto":
        return newest
    facts = _read_marker(resume)
    if facts is None:
        raise SystemExit(f"{resume} is not a complete checkpoint: it has no {MARKER}.")
    if newest is not None and newest[1]["step"] > facts["step"]:
        raise SystemExit(
            f"{root} has a later checkpoint than {resume}, and would be resumed from that one the next time: take "
            "another --checkpoint-dir."
        )
    return resume, facts


def _newest(root: str) -> tuple[str, Facts] | None:
    fs, path = url_to_fs(root)
    fs.invalidate_cache()
    try:
        names = [posixpath.basename(entry.rstrip("/")) for entry in fs.ls(path, detail=False)]
    except FileNotFoundError:
        return None
    for name in sorted(filter(NAME.fullmatch, names), key=_step_and_attempt, reverse=True):
        url = fs.unstrip_protocol(posixpath.join(path, name))
        facts = _read_marker(url)
        if facts is not None:
            return url, facts
    return None


def _step_and_attempt(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _read_marker(url: str) -> Facts | None:
    """The facts of a checkpoint; None where it is not complete: a killed run may leave half a marker, too."""
    fs, path = url_to_fs(url)
    try:
        return json.loads(fs.cat_file(posixpath.join(path, MARKER)))
    except (FileNotFoundError, ValueError):
        return None


@contextlib.contextmanager
def _meant_to_be_alone() -> Iterator[None]:
    """Without dcp's warning of one process that has no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _new_directory(root: str, step: int) -> str:
    """`step-00000300`, or `step-00000300-2` and so on where a run that was killed has left that name."""
    fs, path = url_to_fs(root)
    fs.invalidate_cache()
    name = f"step-{step:08d}"
    candidates = itertools.chain([name], (f"{name}-{attempt}" for attempt in itertools.count(2)))
    return fs.unstrip_protocol(next(d for d in (posixpath.join(path, c) for c in candidates) if not fs.exists(d)))


def _is_local(fs: Any) -> bool:
    return isinstance(fs, LocalFileSystem)
