"""Which checkpoints a run has, which of them are kept, and what is swept away."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from dist_asgd.checkpoint.format.manifest import NAME
from dist_asgd.checkpoint.storage.storage import Storage

SWEEPERS = 8  # requests at once
GRACE = 3600.0  # seconds after its last change that an attempt without a manifest may still be under way

_DIRECTORY = re.compile(r"step-(\d{8,19})-(\d{4,9})-[0-9a-f]{8}")


@dataclass(frozen=True, slots=True, order=True)
class Directory:
    """Of one attempt to save a step; a later attempt at the same step has a larger number."""

    step: int
    attempt: int
    name: str
    is_committed: bool


@dataclass(frozen=True, slots=True)
class Kept:
    """Which steps are kept: the newest ``last`` (None: all), every ``every``-th, and those that are pinned."""

    last: int | None = None
    every: int | None = None
    pinned: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for name, value in {"keep_last": self.last, "keep_every": self.every}.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, or None, got {value!r}")

    def of(self, steps: Iterable[int]) -> set[int]:
        """Those of the ``steps`` that are kept."""
        steps = sorted(steps)
        if self.last is None:
            return set(steps)
        every = {step for step in steps if self.every is not None and step % self.every == 0}
        return {*steps[-self.last :], *every, *(self.pinned & set(steps))}


def directories(storage: Storage) -> list[Directory]:
    """All attempts below the storage's URL, by step and attempt."""
    return attempts(storage.sizes())


def attempts(paths: Iterable[str]) -> list[Directory]:
    """Those that have the files of these ``paths``, by step and attempt."""
    found: dict[str, bool] = {}
    for path in paths:
        name, _, file = path.partition("/")
        found[name] = found.get(name, False) or file == NAME
    matches = [(match, committed) for name, committed in found.items() if (match := _DIRECTORY.fullmatch(name))]
    return sorted(Directory(int(match[1]), int(match[2]), match[0], committed) for match, committed in matches)


def newest_of(found: Iterable[Directory]) -> dict[int, Directory]:
    """By step, the committed attempt that counts."""
    return {directory.step: directory for directory in sorted(found) if directory.is_committed}


def new_directory(storage: Storage, step: int) -> str:
    """A name that no attempt has, above those of all earlier attempts at this step."""
    earlier = [directory.attempt for directory in directories(storage) if directory.step == step]
    return f"step-{step:08d}-{max(earlier, default=0) + 1:04d}-{secrets.token_hex(4)}"


def outdated(storage: Storage, kept: Kept, grace: float = GRACE) -> list[Directory]:
    """The checkpoints that are not kept, and attempts that came to nothing.

    An attempt counts as abandoned ``grace`` seconds after it was last written to.
    """
    found = directories(storage)
    counted = newest_of(found)
    keep = {counted[step].name for step in kept.of(counted)}
    unwanted = [directory for directory in found if directory.is_committed and directory.name not in keep]
    open_ones = (directory for directory in found if not directory.is_committed)
    return unwanted + [directory for directory in open_ones if _age(storage, directory.name) > grace]


def sweep(storage: Storage, kept: Kept, grace: float = GRACE) -> list[str]:
    """Deletes what is ``outdated``, and returns the names. Manifests go first: what is half deleted does not exist."""
    unwanted = [directory.name for directory in outdated(storage, kept, grace)]
    with ThreadPoolExecutor(SWEEPERS, thread_name_prefix="dist_asgd-sweep") as pool:
        uploads = pool.submit(storage.abort_uploads, "", grace)
        # Also of attempts that were open: by a clock that is wrong, they may have been young.
        list(pool.map(lambda name: storage.remove(f"{name}/{NAME}"), unwanted))
        list(pool.map(storage.remove_tree, unwanted))
        uploads.result()
    return unwanted


def _age(storage: Storage, name: str) -> float:
    """Seconds since its last change; 0 where the store does not tell."""
    modified = storage.modified(name)
    return 0.0 if modified is None else time.time() - modified
