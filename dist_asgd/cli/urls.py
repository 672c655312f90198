"""Opens the runs, checkpoints and outputs that URLs on the command line name."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dist_asgd.checkpoint.format.manifest import MANIFEST, STOCK
from dist_asgd.checkpoint.run.listing import Run, list_run
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.checkpoint.storage.url import folder_and_name

RETRY_TIMEOUT = 20.0  # seconds: somebody waits at a terminal


class NotFound(Exception):
    """A URL at which there is no checkpoint; exit status 3."""


class UsageError(Exception):
    """Arguments that argparse accepts and that make no sense together, or here; exit status 2."""


@dataclass(frozen=True, slots=True)
class OpenedCheckpoint:
    """One checkpoint: a storage, and the checkpoint's directory in it."""

    storage: Storage
    directory: str  # relative to the storage's URL; "" where that is the checkpoint's own URL

    @property
    def url(self) -> str:
        """The checkpoint's own URL."""
        return f"{self.storage.url}/{self.directory}" if self.directory else self.storage.url

    def sizes(self) -> dict[str, int]:
        """Returns the bytes of each file of the checkpoint, by its path relative to the checkpoint."""
        return self.storage.sizes(self.directory)


def open_storage(url: str, options: Mapping[str, Any]) -> Storage:
    """Returns the storage at ``url`` without a request to it. Raises ``UsageError`` for a bad URL or bad options."""
    try:
        return Storage.open(url, options, retry_timeout=RETRY_TIMEOUT)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def open_run(storage: Storage) -> Run:
    """Lists the run at the URL of ``storage``. Raises ``NotFound`` where no directory of a checkpoint is."""
    run = list_run(storage)
    if not run.directories:
        raise NotFound(f"{storage.url} has no checkpoints of a run: no directories step-..., that Checkpointer makes")
    return run


def find_checkpoint(url: str, options: Mapping[str, Any], step: int | None) -> OpenedCheckpoint:
    """Returns the checkpoint at ``url``, or one of the run at ``url``.

    Args:
        url: of a checkpoint (of dist_asgd or of ``torch.distributed.checkpoint``), or of the directory of a run.
        options: fsspec's, for the protocol of ``url``.
        step: the step of the run to take; None for the newest that is committed and not abandoned.

    Raises:
        UsageError: for a bad URL or bad options, or where ``step`` is given for the URL of one checkpoint.
        NotFound: where there is no checkpoint, or none of that step.
    """
    storage = open_storage(url, options)
    if {MANIFEST, STOCK} & storage.list().keys():
        if step is not None:
            raise UsageError(f"{storage.url} is one checkpoint: --step is for the directory of a run")
        return OpenedCheckpoint(storage, "")
    run = list_run(storage)
    found = run.live() if step is None else run.loadable()
    if step is None and found:
        step = max(found)
    if step is None:
        raise NotFound(
            f"{storage.url} has no checkpoint: neither {MANIFEST} nor {STOCK}, and no committed steps below it"
        )
    if step not in found:
        raise NotFound(f"{storage.url} has no checkpoint of step {step}; it has {sorted(found)}")
    return OpenedCheckpoint(storage, found[step].name)


def open_parent(url: str, options: Mapping[str, Any]) -> tuple[Storage, str]:
    """Returns the storage of the folder that the file at ``url`` is in, and the file's name. Raises ``UsageError``."""
    try:
        folder, name = folder_and_name(url)
    except ValueError as error:
        raise UsageError(f"OUT: {error}") from error
    return open_storage(folder, options), name


def storage_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns fsspec's options from ``--storage-options FILE``, overridden by each ``--storage-option KEY=VALUE``.

    Raises:
        UsageError: where the file cannot be read or is no JSON object. No message has an option,
            nor the file's name, in whose place options may have been given.
    """
    file, options = arguments.storage_options, {}
    if file is not None:
        try:
            with open(file, encoding="utf-8") as stream:
                options = json.load(stream)
        except ValueError:
            raise UsageError("the file of --storage-options is not valid JSON") from None
        except OSError as error:
            raise UsageError(f"cannot read the file of --storage-options: {error.strerror}") from None
        if not isinstance(options, dict):
            raise UsageError("the file of --storage-options is no JSON object: expected options by their names")
    return {**options, **dict(arguments.storage_option)}


def bytes_in(directory: str, sizes: Mapping[str, int]) -> int:
    """Returns the bytes of all files below ``directory``; ``sizes`` has the bytes of each file of the run by path."""
    return sum(size for path, size in sizes.items() if path.startswith(f"{directory}/"))
