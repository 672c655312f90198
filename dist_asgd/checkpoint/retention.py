"""Names of the checkpoint directories of a run, the policy of which ones are kept, and the deletion of the rest."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from dist_asgd.checkpoint.format.manifest import MANIFEST
from dist_asgd.checkpoint.storage.storage import Storage

DELETE_THREADS = 8  # checkpoints that are deleted at once
GRACE = 3600.0  # seconds since its last change during which an uncommitted attempt counts as under way

_DIRECTORY = re.compile(r"step-(\d{8,19})-(\d{4,9})-[0-9a-f]{8}")


@dataclass(frozen=True, slots=True, order=True)
class Directory:
    """The directory of one attempt to save a step. A later attempt at one step has a larger attempt number."""

    step: int
    attempt: int
    name: str  # relative to the URL of the run
    is_committed: bool  # whether it has a manifest.json


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """Which steps are kept: the newest ``last`` (None: all), the multiples of ``every``, and the ``pinned`` ones.

    Raises ``ValueError`` if ``last`` or ``every`` is neither None nor an int of at least 1.
    """

    last: int | None = None
    every: int | None = None
    pinned: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for name, value in {"keep_last": self.last, "keep_every": self.every}.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, or None, got {value!r}")

    def kept(self, steps: Iterable[int]) -> set[int]:
        """Returns the subset of ``steps`` that is kept."""
        steps = sorted(steps)
        if self.last is None:
            return set(steps)
        every = {step for step in steps if self.every is not None and step % self.every == 0}
        return {*steps[-self.last :], *every, *(self.pinned & set(steps))}


def directories(storage: Storage) -> list[Directory]:
    """Returns all attempts below the URL of ``storage``, sorted by step and attempt. Lists the storage once."""
    return directories_of(storage.sizes())


def directories_of(paths: Iterable[str]) -> list[Directory]:
    """Returns the attempts to which files with these ``paths`` belong, sorted by step and attempt.

    Args:
        paths: relative to the URL of the run, with "/". Paths outside of directories of checkpoints are ignored.
    """
    found: dict[str, bool] = {}
    for path in paths:
        name, _, file = path.partition("/")
        found[name] = found.get(name, False) or file == MANIFEST
    matches = [(match, committed) for name, committed in found.items() if (match := _DIRECTORY.fullmatch(name))]
    return sorted(Directory(int(match[1]), int(match[2]), match[0], committed) for match, committed in matches)


def newest_by_step(found: Iterable[Directory]) -> dict[int, Directory]:
    """Returns for each step its committed attempt with the largest number, which is the one that readers use."""
    return {directory.step: directory for directory in sorted(found) if directory.is_committed}


def new_directory(storage: Storage, step: int) -> str:
    """Returns an unused directory name for ``step``, with a larger attempt number than all existing attempts."""
    earlier = [directory.attempt for directory in directories(storage) if directory.step == step]
    return f"step-{step:08d}-{max(earlier, default=0) + 1:04d}-{secrets.token_hex(4)}"


def outdated(storage: Storage, policy: RetentionPolicy, grace: float = GRACE) -> list[Directory]:
    """Returns the directories to delete: committed ones that ``policy`` does not keep, and abandoned attempts.

    An older committed attempt at a step that has a newer one is not kept.

    Args:
        grace: seconds since its last change after which an uncommitted attempt counts as abandoned.
    """
    found = directories(storage)
    newest = newest_by_step(found)
    keep = {newest[step].name for step in policy.kept(newest)}
    unwanted = [directory for directory in found if directory.is_committed and directory.name not in keep]
    uncommitted = (directory for directory in found if not directory.is_committed)
    return unwanted + [directory for directory in uncommitted if _age(storage, directory.name) > grace]


def delete_outdated(storage: Storage, policy: RetentionPolicy, grace: float = GRACE) -> list[str]:
    """Deletes the directories that ``outdated`` returns, and temporary files older than ``grace``; returns the names.

    Every manifest is deleted before any other file, so a directory that is half deleted is no checkpoint any more.
    """
    unwanted = [directory.name for directory in outdated(storage, policy, grace)]
    with ThreadPoolExecutor(DELETE_THREADS, thread_name_prefix="dist_asgd-delete") as pool:
        uploads = pool.submit(storage.abort_uploads, "", grace)
        # Attempts that were uncommitted are included: with a wrong clock, one may have been committed meanwhile.
        list(pool.map(lambda name: storage.remove(f"{name}/{MANIFEST}"), unwanted))
        list(pool.map(storage.remove_tree, unwanted))
        uploads.result()
    return unwanted


def _age(storage: Storage, name: str) -> float:
    """Returns the seconds since the last change in a directory, or 0.0 if the store does not tell."""
    modified = storage.modified(name)
    return 0.0 if modified is None else time.time() - modified
