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
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch.distributed as dist

from dist_asgd.checkpoint.errors import CheckpointError, DamagedCheckpoint, only_checkpoint_errors, together
from dist_asgd.checkpoint.loading.load import load_checkpoint
from dist_asgd.checkpoint.loading.sources import OwnSource, open_source
from dist_asgd.checkpoint.metrics import SaveCounts
from dist_asgd.checkpoint.retention import DamageRecord, RetentionPolicy, delete_outdated
from dist_asgd.checkpoint.run.directories import Directory
from dist_asgd.checkpoint.run.listing import Run, list_run
from dist_asgd.checkpoint.run.writer import PlannedSave, Writer
from dist_asgd.checkpoint.saving.async_save import BackgroundSave
from dist_asgd.checkpoint.saving.rendezvous import Rendezvous
from dist_asgd.checkpoint.saving.save import SavePlan, plan_save, write
from dist_asgd.checkpoint.saving.staging import StagingMemory
from dist_asgd.checkpoint.state.contents import contents_of
from dist_asgd.checkpoint.state.tree import has_state
from dist_asgd.checkpoint.storage.retry import RETRY_TIMEOUT
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

    A run has one line of checkpoints. After a load of an older step, the next save abandons the checkpoints that are
    newer than that step, which a warning of rank 0 lists: only ``load(step=...)`` loads them, and retention deletes
    them first. One writer saves at a time: of two that go on from the same checkpoint, the one that saves later is
    refused by an error that names the other's host and process. A job that goes on from a killed one waits for nothing.

    A checkpoint may be loaded by another number of ranks, and into another sharding, than it was saved by. All bytes
    that are read are verified by checksums before anything live is changed, and nothing is unpickled.

    The constructor, ``save``, ``load``, ``wait`` and ``close`` are collective: every rank must call them, in the same
    order. As a context manager it calls ``close`` at the end of a block that did not raise.

    Args:
        url: a local path, or the URL of any fsspec protocol: ``s3://bucket/run``, ``gs://``, ``abfs://``, ``sftp://``.
        storage_options: fsspec's options for that protocol, such as credentials or an endpoint. Never logged.
        keep_last: after each save, keep this many of the newest steps and delete the others; None keeps all steps. A
            checkpoint that is known to be damaged, by its manifest, its files' sizes or a load, is not counted.
        keep_every: with ``keep_last``, also keep the steps that are multiples of this number.
        pinned: with ``keep_last``, also keep these steps.
        process_group: the ranks that hold the state; None for all ranks.
        retry_timeout: seconds for which a request to the storage that fails, in an outage for example, is tried again.
            The log says so. Choose less than the timeout of the process group, because ranks wait for one another.

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
        retry_timeout: float = RETRY_TIMEOUT,
    ) -> None:
        self._agreement = Agreement(default_group(process_group), "Checkpointer")
        with together(self._agreement, "Checkpointer()"):
            self._storage = Storage.open(url, storage_options, retry_timeout=retry_timeout)
            self._retention = RetentionPolicy(keep_last, keep_every, frozenset(pinned))
            self._writer = Writer(self._storage)
            self._damage = DamageRecord()
        self._background: BackgroundSave | None = None
        self._counts = SaveCounts()
        self._memory = StagingMemory()  # of the last asynchronous save
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
                Saving a step that is not newer than the newest one abandons the checkpoints after it.
            state: what to save, by name: modules, optimizers, LR schedulers, objects with ``state_dict`` and
                ``load_state_dict``, tensors, values that JSON can express, and dicts and lists of all of these.
            wait: True: return when the checkpoint exists. False: return as soon as this rank's share is copied to the
                CPU, and write it in a background thread. At most one save is under way: the next method call waits for
                it, and raises its error on every rank.

        Raises:
            CheckpointError: on every rank: parameters or state of optimizers differ between ranks that save them under
                one name and not in a ``PerRank``, ranks of an optimizer have taken different steps, or a rank fails to
                write; another writer has saved since this object loaded or saved; the run has checkpoints of ``step``
                or later steps, and this object has loaded none; the URL is that of one checkpoint. Older checkpoints
                stay as they were.
            ValueError, TypeError: an argument is invalid, ``step`` or ``wait`` differ between ranks, or ``state`` has
                something that a checkpoint cannot hold.
        """
        with self._counts.blocked():
            self._finish_background("save()")
            _require_equal(self._agreement, "save()", step=step, wait=wait)
            with self._counts.failures():
                plan, rendezvous, planned = self._prepare(step, state, staged=not wait)
            if wait:
                self._write(plan, rendezvous, planned)  # raises on every rank if it raises on one
            else:
                self._background = BackgroundSave(lambda: self._write(plan, rendezvous, planned))
        return f"{self._storage.url}/{plan.directory}"

    def _prepare(
        self, step: int, state: Mapping[str, Any], *, staged: bool
    ) -> tuple[SavePlan, Rendezvous, PlannedSave | None]:
        """Returns the arguments of ``_write``; if ``staged``, with this rank's share copied to the CPU. Collective."""
        with together(self._agreement, "save()"):
            _check_step(step)
            _check_state(state)
            contents = contents_of(state)
            planned = self._plan_save(step, state) if self._agreement.rank == 0 else None
        name = None if planned is None else planned.directory
        plan = plan_save(self._agreement, step, name, contents, self.latest)
        if self._last_rendezvous is not None and self._agreement.rank == 0:
            self._last_rendezvous.delete_keys()  # all ranks have left it: they have taken part in plan_save
        rendezvous = self._last_rendezvous = Rendezvous(self._agreement, f"save/{plan.directory}")
        if staged:
            with together(self._agreement, "save()"):
                plan = replace(plan, blocks=self._memory.stage(plan.blocks))
        return plan, rendezvous, planned

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
        fallback: bool = False,
        must_exist: bool = False,
    ) -> int | None:
        """Loads the newest checkpoint into ``state``, and returns its step, or None if there is none. Collective.

        Waits for a save in the background first.

        Args:
            state: like that of ``save``, or a part of it, such as only the model. Modules, optimizers, tensors and
                objects with ``load_state_dict`` are filled in place. Values, and dicts and lists of them, become what
                the checkpoint has, whatever they were. Sharding and number of ranks may differ from those at the save.
            step: load the checkpoint of this step; None for the newest. An abandoned checkpoint is loaded if no other
                has this step.
            strict: True: raise if an entry is missing from the checkpoint, unexpected in it, or of another shape.
                False: leave what is missing or of another shape as it is, and ignore what is unexpected; a warning in
                the log lists the shapes.
            average: True: load averages, of ``ShardedASGD`` or ``ShardedAverages``, into the parameters of modules. A
                name: load the average of this name, where there are several.
            cast: True: convert fp64, fp32, fp16 and bf16 into each other, and complex dtypes, where the live tensor has
                another dtype, rounded once; where an optimizer has saved a master, from it. The log says how many.
            prefix: left out of the checkpoint's names of parameters and buffers: ``"model."`` to load a module that was
                saved as the ``model`` of another one. Names of wrappers (DDP, ``torch.compile``) need none.
            fallback: True: where the newest checkpoint is damaged, load the newest one that is not. Rank 0 logs a
                warning for each that was skipped.
            must_exist: True: raise where there is no checkpoint, for jobs that only resume.

        Raises:
            DamagedCheckpoint: on every rank, with nothing changed: bytes or files of the checkpoint are missing or have
                changed; with ``fallback``, of every checkpoint.
            CheckpointError: on every rank. With nothing changed: the step does not exist, or with ``must_exist`` no
                step does; the URL is that of one checkpoint or of a file; entries are missing, unexpected, or of
                another shape or dtype (one error lists them all). With a part of ``state`` loaded, which the message
                says: a ``load_state_dict`` in ``state`` raised.
            ValueError, TypeError: an argument is invalid, or differs between ranks.
        """
        self._finish_background("load()")
        how: dict[str, Any] = {"strict": strict, "average": average, "cast": cast, "prefix": prefix}
        arguments = {"step": step, **how, "fallback": fallback, "must_exist": must_exist}
        _require_equal(self._agreement, "load()", **arguments)
        if fallback and step is not None:
            raise ValueError("step= names one checkpoint, and fallback=True chooses one: pass one of the two")
        skipped: dict[str, str] = {}  # directories of damaged checkpoints, each with the error
        while True:
            with together(self._agreement, "load()"):
                _check_state(state)
                run = self._list_run() if self._agreement.rank == 0 else None
                found = None if run is None else _find_directory(run, step, skipped, must_exist)
            directory: Directory | None = self._agreement.gather(found)[0]
            try:
                if directory is not None:
                    source = open_source(
                        self._agreement, self._storage, directory.name, state, stock=False, trust=False
                    )
                    load_checkpoint(self._agreement, source, state, **how)
                    if isinstance(source, OwnSource):
                        self._counts.loaded(source.manifest.created)
                if run is not None:
                    self._writer.loaded(run, directory, set(map(str, state)))
                    self._counts.lost_steps = _lost_steps(run, directory)
                return None if directory is None else directory.step
            except CheckpointError as error:
                if directory is None:
                    raise
                if step is not None or not self._was_deleted(directory):
                    self._skip_or_raise(directory, error, skipped, fallback)

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints that are not abandoned, ascending. Lists the storage; not collective.

        Raises:
            CheckpointError: the storage cannot be listed, or the URL is that of one checkpoint or of a file.
        """
        return sorted(self._list_run().live())

    def latest(self) -> int | None:
        """Returns the last of ``steps()``, or None if there is no checkpoint. Lists the storage; not collective."""
        steps = self.steps()
        return steps[-1] if steps else None

    def wait(self) -> None:
        """Waits for a save in the background. Collective. Raises ``CheckpointError`` on every rank if it failed."""
        with self._counts.blocked():
            self._finish_background("wait()")

    def metrics(self) -> dict[str, float]:
        """Returns numbers for loggers, of this rank and this object. Sends nothing, lists nothing; not collective.

        ``saves`` are committed and ``failed_saves`` have raised, each one also in the background. The training was
        kept waiting for ``blocked_seconds`` in ``save`` and ``wait``; ``written_bytes`` are those of committed saves.
        ``retried_requests`` are tries that the storage answered with an error and that were made again,
        ``failed_requests`` were given up. ``seconds_since_save`` is the age of the checkpoint that was saved or loaded
        last, of a loaded one by the clocks of both hosts. On rank 0, after a load, there is ``lost_steps``: from the
        step that was loaded to the newest that was there.
        """
        requests = self._storage.request_counts
        return self._counts.metrics() | {"retried_requests": requests.retried, "failed_requests": requests.failed}

    def close(self) -> None:
        """Waits like ``wait``, then frees the memory for background saves. Collective."""
        self._finish_background("close()")
        self._memory.free()

    def _finish_background(self, operation: str) -> None:
        """Waits for a save in the background, and raises its error on every rank. Collective."""
        with together(self._agreement, operation):
            if self._background is not None:
                self._background.wait()  # if this is interrupted, the save stays ours: it still uses the memory
                background, self._background = self._background, None
                background.wait_and_raise()

    def _list_run(self, *, saving: bool = False) -> Run:
        run = list_run(self._storage, self._writer.last)
        run.require(saving=saving)
        return run

    def _plan_save(self, step: int, state: Mapping[str, Any]) -> PlannedSave:
        return self._writer.plan(self._list_run(saving=True), step, set(map(str, state)))

    def _skip_or_raise(
        self, directory: Directory, error: CheckpointError, skipped: dict[str, str], fallback: bool
    ) -> None:
        """Adds a damaged checkpoint to ``skipped`` if ``fallback``; otherwise raises the ``error`` of its load.

        All ranks do alike, because the class of the error is the same on all of them.
        """
        if not isinstance(error, DamagedCheckpoint):
            raise error
        skipped[directory.name] = self._damage.found[directory.name] = str(error)
        if not fallback:
            raise DamagedCheckpoint(
                f"{error}. Call load(fallback=True) to go on from the newest checkpoint that is not damaged, or "
                "load(step=...) for another one"
            ) from error
        if self._agreement.rank == 0:
            logger.warning("%s/%s is damaged and is skipped: %s", self._storage.url, directory.name, error)

    def _was_deleted(self, directory: Directory) -> bool:
        """Returns whether there are only other checkpoints now, because a run that still saves deleted this one.

        Collective.
        """
        with together(self._agreement, "load()"):
            found = list_run(self._storage).live().values() if self._agreement.rank == 0 else ()
        was_deleted = bool(found) and all(other.name != directory.name for other in found)
        return bool(self._agreement.gather(was_deleted)[0])

    def _write(self, plan: SavePlan, rendezvous: Rendezvous, planned: PlannedSave | None) -> None:
        """Writes and commits a checkpoint; then rank 0 deletes outdated ones. Runs no collectives.

        Args:
            planned: on rank 0, what the history of the run says of this save; None on other ranks.
        """
        rank = self._agreement.rank
        with self._counts.failures():
            if planned is None:
                written = write(self._storage, plan, rendezvous, rank)
            else:
                written = write(self._storage, plan, rendezvous, rank, lambda: self._writer.register(planned))
        self._counts.committed(written)
        if planned is None:
            return
        self._writer.saved(planned)
        try:
            delete_outdated(self._storage, self._retention, written=self._writer.last, record=self._damage)
        except Exception as error:  # the new checkpoint exists, so the save has not failed
            logger.warning("old checkpoints below %s could not be deleted: %s", self._storage.url, error)


def _lost_steps(run: Run, loaded: Directory | None) -> int:
    """Returns by how many steps the newest checkpoint of ``run`` that is not abandoned is newer than ``loaded``."""
    return 0 if loaded is None else max(max(run.live(), default=0) - loaded.step, 0)


def _find_directory(run: Run, step: int | None, skipped: Mapping[str, str], must_exist: bool) -> Directory | None:
    """Returns the checkpoint to load, or None if there is none.

    Args:
        skipped: directories that are damaged, each with what is wrong.
    """
    url = run.storage.url
    if step is None:
        found = run.live(skipped)
        if not found and skipped:
            raise DamagedCheckpoint(f"all checkpoints below {url} are damaged: {'; '.join(skipped.values())}")
        if not found and must_exist:
            others = sorted(run.loadable())
            raise CheckpointError(
                f"{url} has no checkpoint to go on from, and load() was called with must_exist=True"
                + (f". It has abandoned ones of the steps {others}: load(step=...) loads one" if others else "")
            )
        return found[max(found)] if found else None
    loadable = run.loadable()
    if step not in loadable:
        live = sorted(run.live())
        others = sorted(loadable.keys() - live)
        also = f", and abandoned ones of {others}" if others else ""
        raise CheckpointError(f"{url} has no checkpoint of step {step}; it has {live}{also}")
    return loadable[step]


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
    agreement = Agreement(default_group(None), "dist_asgd.save()")
    with together(agreement, "save()"):
        storage = Storage.open(url, storage_options)
        _check_state(state)
        contents = contents_of(state)
        if agreement.rank == 0 and storage.list():
            raise CheckpointError(f"{storage.url} is not empty: checkpoints are never overwritten. Take another URL")
    plan = plan_save(agreement, 0, "", contents)
    name = f"save/{secrets.token_hex(8)}" if agreement.rank == 0 else ""
    rendezvous = Rendezvous(agreement, agreement.gather(name)[0])
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
    agreement = Agreement(default_group(None), "dist_asgd.load()")
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
