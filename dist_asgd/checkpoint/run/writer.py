"""The part of one ``Checkpointer`` in the history of its run: which saves it may make, and what they abandon."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Collection
from dataclasses import dataclass

from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.run.directories import Directory, new_directory_name
from dist_asgd.checkpoint.run.history import HistoryEntry, entry_path, write_entry
from dist_asgd.checkpoint.run.listing import Run, last_entry
from dist_asgd.checkpoint.storage.storage import Storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PlannedSave:
    """A save that the history allows."""

    step: int
    directory: str  # of the checkpoint, relative to the URL of the run
    abandoned: tuple[str, ...]  # directories of all checkpoints that are abandoned when it is committed


class Writer:
    """Remembers from where a ``Checkpointer`` goes on, and registers its saves ([Note: history]). Used on rank 0 only.

    Args:
        storage: at the URL of the run.

    Attributes:
        last: the entry of the history that this writer has added last, or None.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.last: HistoryEntry | None = None
        self._name = secrets.token_hex(8)
        self._since = time.time()
        self._number: int | None = None  # the largest in the history when this writer loaded or saved last
        self._saved_step: int | None = None  # that this writer saved last, or None
        self._loaded_step: int | None = None  # that this writer loaded last, since its last save
        self._loaded_names: set[str] = set()  # of the state that was loaded from that step

    def loaded(self, run: Run, directory: Directory | None, names: Collection[str]) -> None:
        """Records a load of some names of state from a checkpoint of ``run``; None: there was no checkpoint."""
        step = None if directory is None else directory.step
        if step != self._loaded_step:
            self._loaded_names.clear()
        self._loaded_names.update(names)
        self._number = 0 if run.last is None else run.last.number
        self._loaded_step = step

    def plan(self, run: Run, step: int, names: Collection[str]) -> PlannedSave:
        """Returns where a save of ``step`` goes and what it abandons. Writes nothing; logs what is newly abandoned.

        Args:
            run: as it is now.
            names: of the state that is saved.

        Raises:
            CheckpointError: another writer has saved since this one loaded or saved, or this one has loaded nothing and
                would go back behind checkpoints that are there.
        """
        last = run.last
        if self._number is not None and last is not None and last.number > self._number and last.writer != self._name:
            raise self._refusal(last)
        newest = max(run.live(), default=-1)
        if self._saved_step is None and self._loaded_step is None and step <= newest:
            by = "" if last is None else f", by {last.who()}"
            raise CheckpointError(
                f"{run.storage.url} has checkpoints up to step {newest}{by}, and this Checkpointer has loaded none of "
                f"them, so it does not save step {step} over them. Call load() first, which goes on from there, or "
                "load(step=...), which goes back; or take another URL"
            )
        self._number = 0 if last is None else last.number
        base = self._goes_on_from(names)
        bound = min(step, step if base is None else base) if step <= newest else newest if base is None else base
        lost = [d for d in run.directories if d.is_committed and not d.is_abandoned and d.step > bound]
        if lost:
            logger.warning(
                "saving step %d after step %d: these checkpoints below %s are abandoned: %s. Only load(step=...) loads "
                "them, and they are deleted first",
                *(step, bound, run.storage.url, ", ".join(d.name for d in lost)),
            )
        abandoned = {d.name for d in [*lost, *(d for d in run.directories if d.is_abandoned)]}
        return PlannedSave(step, new_directory_name(run.directories, step), tuple(sorted(abandoned)))

    def register(self, planned: PlannedSave) -> None:
        """Adds a save to the history, before its checkpoint is committed.

        Raises:
            CheckpointError: another writer has saved since ``plan``. Nothing was committed.
        """
        number = (self._number or 0) + 1
        who = (self._name, socket.gethostname(), os.getpid(), self._since)
        entry = HistoryEntry(number, planned.step, planned.directory, planned.abandoned, time.time(), *who)
        try:
            self._storage.create(entry_path(number), write_entry(entry))
        except FileExistsError:
            raise self._refusal(last_entry(self._storage)) from None
        last = last_entry(self._storage, entry)
        if last is not None and last.number > number:
            raise self._refusal(last)
        self._number, self.last = number, entry

    def saved(self, planned: PlannedSave) -> None:
        """Records that a planned save was committed."""
        self._saved_step, self._loaded_step = planned.step, None
        self._loaded_names.clear()

    def _goes_on_from(self, names: Collection[str]) -> int | None:
        """Returns the step from which state that is saved under ``names`` goes on, or None if that is unknown.

        A load of some names only, as of a model to compare with, does not move the run to the step that was loaded.
        """
        is_covered = self._loaded_step is not None and self._loaded_names.issuperset(names)
        return self._loaded_step if is_covered else self._saved_step

    def _refusal(self, other: HistoryEntry | None) -> CheckpointError:
        who = "" if other is None else f": {other.who()}, has saved {other.what()}"
        return CheckpointError(
            f"{self._storage.url} has another writer{who}, after this Checkpointer had loaded or saved there. Nothing "
            "of this save was kept. If two jobs save there, stop one, or give it another URL; to go on from what is "
            "there now, call load() first"
        )
