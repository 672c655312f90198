"""The policy of which checkpoints of a run are kept, the search for damaged ones, and the deletion of the rest."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.format.manifest import MANIFEST, Manifest, check_size, in_directory, read_manifest
from dist_asgd.checkpoint.run.directories import Directory, newest_by_step
from dist_asgd.checkpoint.run.history import HistoryEntry, entry_numbers, entry_path
from dist_asgd.checkpoint.run.listing import Run, list_run
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.checkpoint.storage.waiting import threads

DELETE_THREADS = 8  # checkpoints that are deleted at once
GRACE = 3600.0  # seconds since its last change during which an uncommitted attempt counts as under way


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

    def is_superseded(self, step: int, sound: Iterable[int]) -> bool:
        """Returns whether there are enough ``sound`` steps after ``step``, so that a damaged one may go."""
        return self.last is not None and sum(other > step for other in sound) >= self.last


@dataclass(slots=True)
class DamageRecord:
    """What one process knows of damaged checkpoints of a run: by its loads, manifests, and sizes of files.

    A committed checkpoint does not change, so each manifest is read once, and sizes are compared at every look.
    """

    found: dict[str, str] = field(default_factory=dict)  # directory -> what is wrong, as a load or manifest said
    _files: dict[str, dict[str, int]] = field(default_factory=dict)  # directory -> bytes of each file by its name

    def damage(self, run: Run, name: str) -> str | None:
        """Returns what is wrong with the committed checkpoint in the directory ``name``, or None."""
        if name not in self.found and name not in self._files:
            try:
                check_size(run.sizes.get(f"{name}/{MANIFEST}", 0))
                self._files[name] = expected_files(read_manifest(run.storage.read(f"{name}/{MANIFEST}")))
            except FileNotFoundError:
                return None  # another process deletes it
            except CheckpointError as error:
                self.found[name] = str(error)
        return self.found.get(name) or wrong_file(self._files[name], run.sizes, name)

    def trust(self, run: Run, name: str) -> None:
        """Takes the sizes of a checkpoint that this process has just committed for those that it should have."""
        start = f"{name}/"
        self._files[name] = {path[len(start) :]: size for path, size in run.sizes.items() if path.startswith(start)}

    def damaged(self, run: Run, policy: RetentionPolicy) -> set[str]:
        """Returns the names of damaged checkpoints; looks only at those that ``policy`` would keep."""
        damaged: set[str] = set()
        sound: set[str] = set()
        while True:
            live = run.live(damaged)
            candidates = {live[step].name for step in policy.kept(live)} - sound
            if not candidates:
                return damaged
            worse = {name for name in candidates if self.damage(run, name) is not None}
            damaged |= worse
            sound |= candidates - worse


def wrong_file(expected: Mapping[str, int], sizes: Mapping[str, int], directory: str) -> str | None:
    """Returns which file of a checkpoint is missing or has another size, or None.

    Args:
        expected: bytes of each file of the checkpoint by its name.
        sizes: bytes of each file below a URL by its path.
        directory: of the checkpoint, relative to the URL; "" where the URL is that of the checkpoint.
    """
    for file, size in expected.items():
        if sizes.get(in_directory(directory, file)) != size:
            return f"{file} is missing, or of another size"
    return None


def expected_files(manifest: Manifest) -> dict[str, int]:
    """Returns the bytes of each file that a manifest lists, by its name."""
    return {name: file.size for name, file in manifest.files.items()}


def outdated(
    run: Run,
    policy: RetentionPolicy,
    grace: float = GRACE,
    *,
    written: str | None = None,
    record: DamageRecord | None = None,
) -> list[Directory]:
    """Returns the directories to delete: committed ones that are not kept, and attempts that were never committed.

    Kept are, of the live checkpoints, the newest attempt at each step of ``policy``. A damaged checkpoint is not
    counted as one of them, and is deleted when as many sound ones are newer as ``policy`` keeps. An abandoned
    checkpoint is kept if ``policy`` keeps all steps, or pins its step and no live checkpoint has it.

    Args:
        grace: seconds since its last change after which an uncommitted attempt counts as given up.
        written: directory of the checkpoint that was just saved, which is kept whatever its step is.
        record: what is known of damaged checkpoints; None for nothing.
    """
    damaged = set() if policy.last is None else (record or DamageRecord()).damaged(run, policy)
    live = run.live(damaged)
    abandoned = newest_by_step(directory for directory in run.directories if directory.is_abandoned)
    spared = abandoned if policy.last is None else {step: abandoned[step] for step in policy.pinned & abandoned.keys()}
    keep = {written, *(live[step].name for step in policy.kept(live))}
    keep |= {directory.name for step, directory in spared.items() if policy.last is None or step not in live}
    keep |= {d.name for d in run.directories if d.name in damaged and not policy.is_superseded(d.step, live)}
    unwanted = [directory for directory in run.directories if directory.is_committed and directory.name not in keep]
    uncommitted = (directory for directory in run.directories if not directory.is_committed)
    return unwanted + [directory for directory in uncommitted if _age(run.storage, directory.name) > grace]


def delete_outdated(
    storage: Storage,
    policy: RetentionPolicy,
    grace: float = GRACE,
    *,
    written: HistoryEntry | None = None,
    record: DamageRecord | None = None,
) -> list[str]:
    """Deletes what ``outdated`` returns, old temporary files, and the history but its newest entry; returns the names.

    Abandoned checkpoints go first. Every manifest is deleted before any other file, so a directory that is half deleted
    is no checkpoint any more. Of a directory that is a link to another place, the link is removed and nothing else.

    Args:
        written: the entry of the save that this process has just committed.
        policy, grace, record: as for ``outdated``.
    """
    with threads(DELETE_THREADS, "dist_asgd-delete") as pool:
        uploads = pool.submit(storage.abort_uploads, "", grace)
        run = list_run(storage, written)
        entries = pool.submit(_forget_older_entries, run)
        if written is not None and record is not None:
            record.trust(run, written.directory)
        kept = None if written is None else written.directory
        unwanted = outdated(run, policy, grace, written=kept, record=record)
        # Attempts that were uncommitted are included: with a wrong clock, one may have been committed meanwhile.
        for is_abandoned in (True, False):
            manifests = (f"{d.name}/{MANIFEST}" for d in unwanted if d.is_abandoned is is_abandoned)
            list(pool.map(storage.remove, manifests))
        list(pool.map(storage.remove_tree, [directory.name for directory in unwanted]))
        uploads.result()
        entries.result()
    return [directory.name for directory in unwanted]


def _forget_older_entries(run: Run) -> None:
    for number in entry_numbers(run.sizes)[:-1]:
        run.storage.remove(entry_path(number))


def _age(storage: Storage, name: str) -> float:
    """Returns the seconds since the last change in a directory, or 0.0 if the store does not tell."""
    modified = storage.modified(name)
    return 0.0 if modified is None else time.time() - modified
