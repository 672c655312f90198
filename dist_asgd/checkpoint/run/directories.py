"""Names of the directories in which a run has its checkpoints, and which of them readers use."""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from dist_asgd.checkpoint.format.manifest import MANIFEST

_DIRECTORY = re.compile(r"step-(\d{8,19})-(\d{4,9})-[0-9a-f]{8}")


@dataclass(frozen=True, slots=True, order=True)
class Directory:
    """The directory of one attempt to save a step. A later attempt at one step has a larger attempt number."""

    step: int
    attempt: int
    name: str  # relative to the URL of the run
    is_committed: bool  # whether it has a manifest.json
    is_abandoned: bool  # whether the run went back to an older step, and went on from there without this checkpoint


def is_directory_name(name: str) -> bool:
    """Returns whether ``name`` is one that ``new_directory_name`` makes."""
    return _DIRECTORY.fullmatch(name) is not None


def directories_of(paths: Iterable[str], abandoned: Collection[str] = ()) -> list[Directory]:
    """Returns the attempts to which files with these ``paths`` belong, sorted by step and attempt.

    Args:
        paths: relative to the URL of the run, with "/". Paths outside of directories of checkpoints are ignored.
        abandoned: names of the directories that the run has abandoned.
    """
    found: dict[str, bool] = {}
    for path in paths:
        name, _, file = path.partition("/")
        found[name] = found.get(name, False) or file == MANIFEST
    matches = [(match, committed) for name, committed in found.items() if (match := _DIRECTORY.fullmatch(name))]
    return sorted(
        Directory(int(match[1]), int(match[2]), match[0], committed, match[0] in abandoned)
        for match, committed in matches
    )


def newest_by_step(found: Iterable[Directory]) -> dict[int, Directory]:
    """Returns for each step its committed attempt with the largest number, which is the one that readers use."""
    return {directory.step: directory for directory in sorted(found) if directory.is_committed}


def new_directory_name(existing: Iterable[Directory], step: int) -> str:
    """Returns an unused directory name for ``step``, with a larger attempt number than all existing attempts."""
    earlier = [directory.attempt for directory in existing if directory.step == step]
    return f"step-{step:08d}-{max(earlier, default=0) + 1:04d}-{secrets.token_hex(4)}"
