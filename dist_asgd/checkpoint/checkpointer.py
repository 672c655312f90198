"""The functions that users call: ``Checkpointer``, ``save`` and ``load``.

A save goes through ``plan_save`` and ``write`` in ``checkpoint/saving/save.py`` to ``commit`` in
``checkpoint/saving/commit.py``, where [Note: commit] describes what is written in which order and what a crash leaves.
A load goes through ``open_source`` in ``checkpoint/loading/sources.py`` and ``load_checkpoint`` in
``checkpoint/loading/load.py``.
"""

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
from dist_asgd.checkpoint.loading.sources import open_source
from dist_asgd.checkpoint.retention import (
    Directory,
    RetentionPolicy,
    delete_outdated,
    directories,
    new_directory,
    newest_by_step,
)
from dist_asgd.checkpoint.saving.async_save import BackgroundSave
from dist_asgd.checkpoint.saving.rendezvous import Rendezvous, clone_default_store
from dist_asgd.checkpoint.saving.save import SavePlan, plan_save, stage, write
from dist_asgd.checkpoint.state.contents import contents_of
from dist_asgd.checkpoint.state.tree import has_state
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.comm.consensus import Agreement
from dist_asgd.comm.process_groups import default_group

logger = logging.getLogger(__name__)


class Checkpointer:
    """Saves and loads the checkpoints of a run, below one URL, with any number of ranks.

    Each checkpoint is a directory of its own, such as ``step-00000300-0001-5f3a9c1e``. It has one file for each rank
    that has something to write, ``.metadata``, by which ``torch.distributed.checkpoint`` (DCP) can load it, and
    ``manifest.json``, which is created last, when everything else is written. Every method ignores a directory without
    ``manifest.json``. A directory that has one is never written to again.

    A checkpoint may be loaded by another number of ranks, and into another sharding, than it was saved by. All bytes
    that are read are verified by checksums before anything live is changed, and nothing is unpickled.

    The constructor, ``save``, ``load``, ``wait`` and ``close`` are collective: every rank must call them, in the same
    order. As a context manager it calls ``close`` at the end of a block that did not raise.

    Args:
        url: a local path, or the URL of any fsspec protocol: ``s3://bucket/run``, ``gs://``, ``abfs://``, ``sftp://``.
        storage_options: fsspec's options for that protocol, such as credentials or an endpoint. Never logged.
        keep_last: after each save, keep this many of the newest steps and delete the others; None keeps all steps.
        keep_every: with ``keep_last``, also keep the steps that are multiples of this number.
        pinned: with ``keep_last``, also keep these steps.
        process_group: the ranks that hold the state; None for all ranks.

    Raises:
        ValueError, TypeError: an argument is invalid. Raised on every rank if it is invalid on any.
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
            self._retention = RetentionPolicy(keep_last, keep_every, frozenset(pinned))
            self._store = clone_default_store()
        self._background: BackgroundSave | None = None
        self._buffer: Tensor | None = None  # 1-D, uint8, on the CPU: staged blocks of the last asynchronous save
        self._last_rendezvous: Rendezvous | None = None

    @property
    def url(self) -> str:
        """The URL of the run, without credentials and query."""
        return self._storage.url

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif self._background is not None:  # close() is collective, and after an error other ranks may not call it
            self._background.wait_and_log()

    @only_checkpoint_errors()
    def save(self, step: int, state: Mapping[str, Any], *, wait: bool = True) -> str:
        """Saves a checkpoint of ``state``, and returns its URL. Collective.

        Args:
            step: an int, 0 <= step < 10**18. Saving a step again writes another directory, and replaces the older one.
            state: what to save, by name: modules, optimizers, LR schedulers, objects with ``state_dict`` and
                ``load_state_dict``, tensors, values that JSON can express, and dicts and lists of all of these.
            wait: True: return when the checkpoint exists. False: return as soon as this rank's share is copied to the
                CPU, and write it in a background thread. At most one save is under way: the next method call waits for
                it, and raises its error on every rank.

        Raises:
            CheckpointError: on every rank: parameters or state of optimizers differ between ranks that save them under
                one name and not in a ``PerRank``, ranks of an optimizer have taken different steps, or a rank fails to
                write. Older checkpoints stay as they were.
            ValueError, TypeError: an argument is invalid, ``step`` or ``wait`` differ between ranks, or ``state`` has
                something that a checkpoint cannot hold.
        """
        self._finish_background("save()")
        _require_equal(self._agreement, "save()", step=step, wait=wait)
        with together(self._agreement, "save()"):
            _check_step(step)
            _check_state(state)
            contents = contents_of(state)
            name = new_directory(self._storage, step) if self._agreement.rank == 0 else None
        plan = plan_save(self._agreement, step, name, contents, self.latest)
        if self._last_rendezvous is not None and self._agreement.rank == 0:
            self._last_rendezvous.delete_keys()  # all ranks have left it: they have taken part in plan_save
        place = self._agreement.rank, self._agreement.world_size
        rendezvous = self._last_rendezvous = Rendezvous(self._store, f"dist_asgd/{plan.directory}", *place)
        if wait:
            self._write(plan, rendezvous)  # raises on every rank if it raises on one
        else:
            with together(self._agreement, "save()"):
                staged, self._buffer = stage(plan.blocks, self._buffer)
            plan = SavePlan(plan.directory, staged, plan.record)
            self._background = BackgroundSave(lambda: self._write(plan, rendezvous))
        return f"{self._storage.url}/{plan.directory}"

    @only_checkpoint_errors()
    def load(
        self,
        state: Mapping[str, Any],
        *,
        step: int | None = None,
        strict: bool = True,
        average: bool | str = False,
        cast: bool = False,
        prefix: str = "",
    ) -> int | None:
        """Loads the newest checkpoint into ``state``, and returns its step, or None if there is none. Collective.

        Waits for a save in the background first.

        Args:
            state: like that of ``save``, or a part of it, such as only the model. Modules, optimizers, tensors and
                objects with ``load_state_dict`` are filled in place. Values, and dicts and lists of them, become what
                the checkpoint has, whatever they were. Sharding and number of ranks may differ from those at the save.
            step: load the checkpoint of this step; None for the newest.
            strict: True: raise if an entry is missing from the checkpoint, unexpected in it, or of another shape.
                False: leave what is missing or of another shape as it is, and ignore what is unexpected; a warning in
                the log lists the shapes.
            average: True: load an optimizer's averages (``ax``) into the parameters of modules. A name: load the
                average of this name, of an optimizer that has several.
            cast: True: convert fp64, fp32, fp16 and bf16 into each other, and complex dtypes, where the live tensor has
                another dtype, rounded once; where an optimizer has saved a master, from it. The log says how many.
            prefix: left out of the checkpoint's names of parameters and buffers: ``"model."`` to load a module that was
                saved as the ``model`` of another one. Names of wrappers (DDP, ``torch.compile``) need none.

        Raises:
            CheckpointError: on every rank. With nothing changed: the step does not exist; entries are missing,
                unexpected, or of another shape or dtype (one error lists them all); bytes that were read are damaged.
                With a part of ``state`` loaded, which the message says: a ``load_state_dict`` in ``state`` raised.
            ValueError, TypeError: an argument is invalid, or differs between ranks.
        """
        self._finish_background("load()")
        _require_equal(self._agreement, "load()", step=step, strict=strict, average=average, cast=cast, prefix=prefix)
        while True:
            with together(self._agreement, "load()"):
                _check_state(state)
                found = self._find_directory(step) if self._agreement.rank == 0 else None
            directory = self._agreement.gather(found)[0]
            if directory is None:
                return None
            try:
                source = open_source(self._agreement, self._storage, directory.name, state, stock=False, trust=False)
                load_checkpoint(
                    self._agreement, source, state, strict=strict, average=average, cast=cast, prefix=prefix
                )
                return directory.step
            except CheckpointError:
                if step is not None or not self._was_deleted(directory):
                    raise

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, ascending. Lists the storage; not collective."""
        return sorted({directory.step for directory in directories(self._storage) if directory.is_committed})

    def latest(self) -> int | None:
        """Returns the newest step, or None if there is no checkpoint. Lists the storage; not collective."""
        steps = self.steps()
        return steps[-1] if steps else None

    def wait(self) -> None:
        """Waits for a save in the background. Collective. Raises ``CheckpointError`` on every rank if it failed."""
        self._finish_background("wait()")

    def close(self) -> None:
        """Waits like ``wait``, then frees the buffer of this object. Collective."""
        self._finish_background("close()")
        self._buffer = None

    def _finish_background(self, operation: str) -> None:
        """Waits for a save in the background, and raises its error on every rank. Collective."""
        with together(self._agreement, operation):
            if self._background is not None:
                self._background.wait()  # if this is interrupted, the save stays ours: it still uses the buffer
                background, self._background = self._background, None
                background.wait_and_raise()

    def _find_directory(self, step: int | None) -> Directory | None:
        found = newest_by_step(directories(self._storage))
        if step is None:
            return found[max(found)] if found else None
        if step not in found:
            raise CheckpointError(f"{self._storage.url} has no checkpoint of step {step}; it has {sorted(found)}")
        return found[step]

    def _was_deleted(self, directory: Directory) -> bool:
        """Returns whether there are only other checkpoints now, because a run that still saves deleted this one.

        Collective.
        """
        with together(self._agreement, "load()"):
            found = newest_by_step(directories(self._storage)).values() if self._agreement.rank == 0 else ()
        was_deleted = bool(found) and all(other.name != directory.name for other in found)
        return bool(self._agreement.gather(was_deleted)[0])

    def _write(self, plan: SavePlan, rendezvous: Rendezvous) -> None:
        """Writes and commits a checkpoint; then rank 0 deletes outdated ones. Runs no collectives."""
        write(self._storage, plan, rendezvous, self._agreement.rank)
        if plan.record is not None:
            try:
                delete_outdated(self._storage, self._retention)
            except Exception as error:  # the new checkpoint exists, so the save has not failed
                logger.warning("old checkpoints below %s could not be deleted: %s", self._storage.url, error)


@only_checkpoint_errors()
def save(
    url: str | os.PathLike[str], state: Mapping[str, Any], storage_options: Mapping[str, Any] | None = None
) -> None:
    """Saves a single checkpoint in the directory ``url``, which must be empty or missing. Collective.

    The files are those of ``Checkpointer.save``; the recorded step is 0. The checkpoint exists when this returns.

    Args:
        url, storage_options: as for ``Checkpointer``.
        state: as for ``Checkpointer.save``.

    Raises:
        CheckpointError: on every rank: the directory is not empty, a rank failed to write, or ranks differ, as for
            ``Checkpointer.save``.
        ValueError, TypeError: an argument is invalid, or ``state`` has something that a checkpoint cannot hold.
    """
    agreement = Agreement(default_group(None))
    with together(agreement, "save()"):
        storage = Storage.open(url, storage_options)
        _check_state(state)
        contents = contents_of(state)
        store = clone_default_store()
        if agreement.rank == 0 and storage.list():
            raise CheckpointError(f"{storage.url} is not empty: checkpoints are never overwritten. Take another URL")
    plan = plan_save(agreement, 0, "", contents)
    name = f"dist_asgd/{secrets.token_hex(8)}" if agreement.rank == 0 else ""
    rendezvous = Rendezvous(store, agreement.gather(name)[0], agreement.rank, agreement.world_size)
    write(storage, plan, rendezvous, agreement.rank)


@only_checkpoint_errors()
def load(
    url: str | os.PathLike[str],
    state: Mapping[str, Any],
    storage_options: Mapping[str, Any] | None = None,
    *,
    strict: bool = True,
    average: bool | str = False,
    cast: bool = False,
    prefix: str = "",
    trust: bool = False,
) -> None:
    """Loads the checkpoint in the directory ``url`` into ``state``. Collective.

    It may have been written by ``save`` or ``Checkpointer``, or by stock ``torch.distributed.checkpoint.save`` (DCP)
    from ``model.state_dict()`` and ``get_optimizer_state_dict()``, under the names that ``state`` has for them. A
    checkpoint of DCP has no checksums but the CRC-32s in its archives. They are verified, so a rank reads the whole of
    each stored chunk of which it needs a part.

    Args:
        url, storage_options: as for ``Checkpointer``; the directory of one checkpoint, not that of a run.
        state, strict, average, cast, prefix: as for ``Checkpointer.load``.
        trust: True: unpickle the values of a DCP checkpoint, which CAN RUN ANY CODE that its writer has put there.
            False: read only values that are plain data: numbers, strings, bytes, containers, NumPy arrays, tensors.
            Nothing of a checkpoint of this library is ever unpickled.

    Raises:
        CheckpointError: as for ``Checkpointer.load``; also if ``url`` has no checkpoint, or a value of a DCP checkpoint
            is not plain data and ``trust`` is False. The message has its key and class.
        ValueError: ``strict``, ``average``, ``cast``, ``prefix`` or ``trust`` differ between ranks.
        TypeError: ``state`` is not a dict.
    """
    agreement = Agreement(default_group(None))
    with together(agreement, "load()"):
        storage = Storage.open(url, storage_options)
        _check_state(state)
    _require_equal(agreement, "load()", strict=strict, average=average, cast=cast, prefix=prefix, trust=trust)
    source = open_source(agreement, storage, "", state, stock=True, trust=trust)
    load_checkpoint(agreement, source, state, strict=strict, average=average, cast=cast, prefix=prefix)


def _require_equal(agreement: Agreement, operation: str, **arguments: object) -> None:
    facts = [(name, repr(value)) for name, value in arguments.items()]
    agreement.require_equal(f"the arguments of {operation}", facts)


def _check_state(state: object) -> None:
    if not isinstance(state, Mapping) or has_state(state):
        raise TypeError(f"state must be a dict, by names, like {{'model': model}}, got a {type(state).__name__}")


def _check_step(step: object) -> None:
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 10**18:
        raise ValueError(f"step must be a whole number of at least 0, got {step!r}")
