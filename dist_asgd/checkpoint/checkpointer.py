"""``Checkpointer``, ``save`` and ``load``: what users call."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Collection, Mapping
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor

from dist_asgd.checkpoint.errors import CheckpointError, only_checkpoint_errors, together
from dist_asgd.checkpoint.loading.load import load_checkpoint
from dist_asgd.checkpoint.loading.sources import source_of
from dist_asgd.checkpoint.retention import Directory, Kept, directories, new_directory, newest_of, sweep
from dist_asgd.checkpoint.saving.async_save import Background
from dist_asgd.checkpoint.saving.rendezvous import Rendezvous, store_of_its_own
from dist_asgd.checkpoint.saving.save import SavePlan, plan_save, stage, write
from dist_asgd.checkpoint.state.contents import contents_of
from dist_asgd.checkpoint.state.tree import has_state
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.comm.consensus import Agreement, agreement_of_all
from dist_asgd.comm.process_groups import default_group

logger = logging.getLogger(__name__)


class Checkpointer:
    """The checkpoints of a run, below one URL. Any number of ranks writes them, any other number reads them.

    A checkpoint is a directory, ``step-00000300-0001-5f3a9c1e``, that is never written to again: a file for each rank,
    the ``.metadata`` by which ``torch.distributed.checkpoint`` reads them too, and ``manifest.json``, which is written
    last and only if everything else is there. A directory without it does not exist for any method here. Every byte has
    a checksum; what is read is verified before anything live is changed, and nothing is unpickled.

    The constructor, ``save``, ``load``, ``wait`` and ``close`` are collective: every rank must call them.

    Args:
        url: a local path, or the URL of any fsspec protocol: ``s3://bucket/run``, ``gs://``, ``abfs://``, ``sftp://``.
        storage_options: fsspec's, for that protocol: credentials, an endpoint. Never logged.
        keep_last: after each save keep this many of the newest checkpoints, and delete others; None keeps all.
        keep_every: keep those too whose step is a multiple of this.
        pinned: steps to keep in any case.
        process_group: the ranks that have the state; None for all.

    Raises:
        ValueError, TypeError: bad arguments; the same on every rank.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        storage_options: Mapping[str, Any] | None = None,
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        pinned: Collection[int] = (),
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._agreement = Agreement(default_group(process_group))
        with together(self._agreement, "Checkpointer()"):
            self._storage = Storage.open(url, storage_options)
            self._kept = Kept(keep_last, keep_every, frozenset(pinned))
            self._store = store_of_its_own()
        self._background: Background | None = None
        self._buffer: Tensor | None = None  # staged copies of the last asynchronous save
        self._last: Rendezvous | None = None

    @property
    def url(self) -> str:
        """Without credentials."""
        return self._storage.url

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif self._background is not None:  # others may never come: finish what needs none of them
            self._background.end()

    @only_checkpoint_errors()
    def save(self, step: int, state: Mapping[str, Any], *, wait: bool = True) -> str:
        """Saves a checkpoint of ``state``, and returns its URL. Collective.

        Args:
            step: >= 0. A step that was saved before gets another directory; then the newer one counts.
            state: what to save, by name: modules, optimizers, LR schedulers, anything with ``state_dict`` and
                ``load_state_dict``, tensors, and what JSON can express, in dicts and lists too.
            wait: False: return as soon as this rank's share is copied, and write it in the background. One save is
                under way at most. What goes wrong is raised, on every rank, by the next call of a method.

        Raises:
            CheckpointError: it could not be written, on any rank; raised on all of them. Older checkpoints are as they
                were.
            ValueError, TypeError: bad arguments, or others on another rank; a state that a checkpoint cannot hold.
        """
        self._settle("save()")
        _require_equal(self._agreement, "save()", step=step, wait=wait)
        with together(self._agreement, "save()"):
            _check_step(step)
            _check_state(state)
            contents = contents_of(state)
            name = new_directory(self._storage, step) if self._agreement.rank == 0 else None
        plan = plan_save(self._agreement, step, name, contents)
        if self._last is not None and self._agreement.rank == 0:
            self._last.forget()
        meeting = self._last = Rendezvous(self._store, f"dist_asgd/{plan.directory}", *self._place)
        if wait:
            self._write(plan, meeting)  # it fails on every rank if it does on one
        else:
            with together(self._agreement, "save()"):
                staged, self._buffer = stage(plan.parts, self._buffer)
            plan = SavePlan(plan.directory, staged, plan.record)
            self._background = Background(lambda: self._write(plan, meeting))
        return f"{self._storage.url}/{plan.directory}"

    @only_checkpoint_errors()
    def load(
        self,
        state: Mapping[str, Any],
        *,
        step: int | None = None,
        strict: bool = True,
        average: bool | str = False,
    ) -> int | None:
        """Loads the newest checkpoint into ``state``, and returns its step; None if there is none. Collective.

        Nothing is unpickled, and there is no ``trust``: a ``Checkpointer`` sees only what ``Checkpointer`` has saved.

        Args:
            state: as in ``save``, or a part of it: just the model, just the optimizer. Modules, optimizers, tensors and
                whatever has ``load_state_dict`` are filled; values are replaced in the dicts that hold them. The layout
                and the number of ranks may be others than they were.
            step: load this one instead.
            strict: False: leave what the checkpoint has not as it is, and ignore what ``state`` has no place for.
            average: load an optimizer's averages (``ax``) into the parameters of modules; of several, those that have
                this name.

        Raises:
            CheckpointError: on every rank, with nothing changed: there is no such step; something is missing,
                unexpected, or of another shape or dtype (one error lists all); bytes are damaged. What
                ``load_state_dict`` of something in ``state`` raises is a CheckpointError too; it says that a part is
                loaded then.
        """
        self._settle("load()")
        _require_equal(self._agreement, "load()", step=step, strict=strict, average=average)
        while True:
            with together(self._agreement, "load()"):
                _check_state(state)
                found = self._find(step) if self._agreement.rank == 0 else None
            directory = self._agreement.gather(found)[0]
            if directory is None:
                return None
            try:
                source = source_of(self._agreement, self._storage, directory.name, state, stock=False, trust=False)
                load_checkpoint(self._agreement, source, state, strict=strict, average=average)
                return directory.step
            except CheckpointError:
                if step is not None or not self._is_outdated(directory):
                    raise

    def steps(self) -> list[int]:
        """The steps of all checkpoints, ascending. Asks the storage; not collective."""
        return sorted({directory.step for directory in directories(self._storage) if directory.is_committed})

    def latest(self) -> int | None:
        """The newest step; None if there is none. Not collective."""
        steps = self.steps()
        return steps[-1] if steps else None

    def wait(self) -> None:
        """Waits for a save in the background. Collective; raises what went wrong."""
        self._settle("wait()")

    def close(self) -> None:
        """Waits, and frees what the Checkpointer holds: a process group, a buffer. Collective."""
        self._settle("close()")
        self._buffer = None
        if self._agreement.group is not None:
            dist.destroy_process_group(self._agreement.group)

    @property
    def _place(self) -> tuple[int, int]:
        return self._agreement.rank, self._agreement.world_size

    def _settle(self, operation: str) -> None:
        with together(self._agreement, operation):
            if self._background is not None:
                self._background.join()  # while it writes, its buffer is not free: also if this is interrupted
                background, self._background = self._background, None
                background.finish()

    def _find(self, step: int | None) -> Directory | None:
        found = newest_of(directories(self._storage))
        if step is None:
            return found[max(found)] if found else None
        if step not in found:
            raise CheckpointError(f"{self._storage.url} has no checkpoint of step {step}; it has {sorted(found)}")
        return found[step]

    def _is_outdated(self, directory: Directory) -> bool:
        """Whether it was deleted while we read, by the retention of a run that still saves newer ones. Collective."""
        with together(self._agreement, "load()"):
            found = newest_of(directories(self._storage)).values() if self._agreement.rank == 0 else ()
        outdated = bool(found) and all(other.name != directory.name for other in found)
        return bool(self._agreement.gather(outdated)[0])

    def _write(self, plan: SavePlan, meeting: Rendezvous) -> None:
        write(self._storage, plan, meeting, self._agreement.rank)
        if plan.record is not None:
            try:
                sweep(self._storage, self._kept)
            except Exception as error:  # the checkpoint is there
                logger.warning("old checkpoints below %s could not be deleted: %s", self._storage.url, error)


@only_checkpoint_errors()
def save(
    url: str | os.PathLike[str], state: Mapping[str, Any], storage_options: Mapping[str, Any] | None = None
) -> None:
    """Saves one checkpoint at ``url``, a directory that is not there yet. Collective.

    ``state``, errors and what is written are as in ``Checkpointer.save``.
    """
    with agreement_of_all() as agreement:
        with together(agreement, "save()"):
            storage = Storage.open(url, storage_options)
            _check_state(state)
            contents = contents_of(state)
            store = store_of_its_own()
            if agreement.rank == 0 and storage.list():
                raise CheckpointError(
                    f"{storage.url} is not empty: checkpoints are never overwritten. Take another URL"
                )
        plan = plan_save(agreement, 0, "", contents)
        name = f"dist_asgd/{secrets.token_hex(8)}" if agreement.rank == 0 else ""
        meeting = Rendezvous(store, agreement.gather(name)[0], agreement.rank, agreement.world_size)
        write(storage, plan, meeting, agreement.rank)


@only_checkpoint_errors()
def load(
    url: str | os.PathLike[str],
    state: Mapping[str, Any],
    storage_options: Mapping[str, Any] | None = None,
    *,
    strict: bool = True,
    average: bool | str = False,
    trust: bool = False,
) -> None:
    """Loads the checkpoint at ``url``, a directory, into ``state``. Collective.

    It may be one that ``save`` or a ``Checkpointer`` wrote, or what stock ``torch.distributed.checkpoint.save`` made of
    ``model.state_dict()`` and ``get_optimizer_state_dict()``, under the names that ``state`` has for them. That has no
    checksums but the CRC-32s in its archives, which are verified; a rank reads all of each stored part that it needs
    some of.

    Args:
        url, state, storage_options, strict, average: as in ``Checkpointer``.
        trust: of a stock checkpoint, unpickle the values: THIS CAN RUN ANY CODE that whoever wrote it has put there. By
            default values are read where they are plain data: numbers, strings, bytes, containers of them, NumPy's
            arrays, tensors. Of our own nothing is ever unpickled. The same on every rank.

    Raises:
        CheckpointError: as ``Checkpointer.load``; also for a value that is not plain, with its key and class.
        ValueError: ranks disagree on ``strict``, ``average`` or ``trust``.
    """
    with agreement_of_all() as agreement:
        with together(agreement, "load()"):
            storage = Storage.open(url, storage_options)
            _check_state(state)
        _require_equal(agreement, "load()", strict=strict, average=average, trust=trust)
        source = source_of(agreement, storage, "", state, stock=True, trust=trust)
        load_checkpoint(agreement, source, state, strict=strict, average=average)


def _require_equal(agreement: Agreement, operation: str, **arguments: object) -> None:
    facts = [(name, repr(value)) for name, value in arguments.items()]
    agreement.require_equal(f"the arguments of {operation}", facts)


def _check_state(state: object) -> None:
    if not isinstance(state, Mapping) or has_state(state):
        raise TypeError(f"state must be a dict, by names, like {{'model': model}}, got a {type(state).__name__}")


def _check_step(step: object) -> None:
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 10**18:
        raise ValueError(f"step must be a whole number of at least 0, got {step!r}")
