"""Checkpoints of stock `torch.distributed.checkpoint` at any fsspec URL.

Every rank writes what it owns, and any number of ranks reads it. A checkpoint is a directory, `step-00000300`, that is
never written to again. The marker in it is written last, when every rank has saved: a directory without one is what a
killed run left behind, and does not count.
"""

import itertools
import json
import posixpath
import re
import warnings
from typing import Any

import torch.distributed.checkpoint as dcp
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

from world import World

MARKER = "complete.json"

State = dict[str, Any]  # tensors, whole or this rank's share of them, in nested dicts
Facts = dict[str, Any]  # what fits in JSON


def save(root: str, step: int, state: State, facts: Facts, world: World) -> str:
    """Write `state` to a new directory below `root`, then `facts` as its marker; returns its URL. Collective."""
    url = world.from_rank_zero(lambda: _new_directory(root, step))
    fs, path = url_to_fs(url)
    # FsspecWriter's sync_files calls os.sync(), which flushes every disk of the machine. A local file needs fsync only.
    writer = dcp.FileSystemWriter(path) if _is_local(fs) else FsspecWriter(url, sync_files=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # said of one process, which is meant
        dcp.save(state, storage_writer=writer, process_group=world.control, no_dist=world.control is None)
    marker = json.dumps({"step": step, **facts}, indent=1).encode()
    # dcp.save has returned, so every rank has written everything: the ranks exchange their results in it.
    world.from_rank_zero(lambda: fs.pipe_file(posixpath.join(path, MARKER), marker))
    return url


def load(url: str, state: State, world: World) -> None:
    """Read a checkpoint into the tensors of `state`; what is no tensor is replaced. Collective."""
    fs, path = url_to_fs(url)
    reader = dcp.FileSystemReader(path) if _is_local(fs) else FsspecReader(url)
    dcp.load(state, storage_reader=reader, process_group=world.control, no_dist=world.control is None)


def find(root: str, resume: str, world: World) -> tuple[str, Facts] | None:
    """The URL and the facts of the checkpoint to go on from, the same on every rank.

    Args:
        root: where `save` puts checkpoints; may be empty.
        resume: "auto" for the newest complete one below `root`, if there is one; "no" for none; or its URL.
    """
    if resume == "no" or (resume == "auto" and not root):
        return None
    return world.from_rank_zero(lambda: _newest(root) if resume == "auto" else _complete(resume))


def _newest(root: str) -> tuple[str, Facts] | None:
    fs, path = url_to_fs(root)
    fs.invalidate_cache()
    directories = [posixpath.dirname(marker) for marker in fs.glob(f"{path}/step-*/{MARKER}")]
    return _complete(fs.unstrip_protocol(max(directories, key=_step_and_attempt))) if directories else None


def _step_and_attempt(directory: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", posixpath.basename(directory))]


def _complete(url: str) -> tuple[str, Facts]:
    fs, path = url_to_fs(url)
    try:
        return url, json.loads(fs.cat_file(posixpath.join(path, MARKER)))
    except FileNotFoundError:
        raise SystemExit(f"{url} is not a complete checkpoint: it has no {MARKER}.") from None


def _new_directory(root: str, step: int) -> str:
    """`step-00000300`, or `step-00000300-2` and so on where a run that was killed has left that name."""
    fs, path = url_to_fs(root)
    fs.invalidate_cache()
    name = f"step-{step:08d}"
    candidates = itertools.chain([name], (f"{name}-{attempt}" for attempt in itertools.count(2)))
    return fs.unstrip_protocol(next(d for d in (posixpath.join(path, c) for c in candidates) if not fs.exists(d)))


def _is_local(fs: Any) -> bool:
    return isinstance(fs, LocalFileSystem)
