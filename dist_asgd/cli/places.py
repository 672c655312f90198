"""Where the checkpoint lies that a command is about."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_asgd.checkpoint.format.manifest import NAME, STOCK
from dist_asgd.checkpoint.retention import directories, newest_by_step
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.checkpoint.storage.url import folder_and_name

LOCAL = "file"


class NotFound(Exception):
    """There is no checkpoint."""


class UsageError(Exception):
    """The arguments cannot be meant so."""


@dataclass(frozen=True, slots=True)
class OpenedCheckpoint:
    """One checkpoint."""

    storage: Storage
    directory: str  # in the storage; "" where its URL is the checkpoint's

    @property
    def url(self) -> str:
        return f"{self.storage.url}/{self.directory}" if self.directory else self.storage.url

    def sizes(self) -> dict[str, int]:
        return self.storage.sizes(self.directory)


def opened(url: str, options: Mapping[str, Any]) -> Storage:
    try:
        return Storage.open(url, options)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def checkpoint_at(url: str, options: Mapping[str, Any], step: int | None) -> OpenedCheckpoint:
    """The checkpoint at ``url``, or of the run there: the newest, or that of ``step``."""
    storage = opened(url, options)
    if {NAME, STOCK} & storage.list().keys():
        if step is not None:
            raise UsageError(f"{storage.url} is one checkpoint: --step is for the directory of a run")
        return OpenedCheckpoint(storage, "")
    found = newest_by_step(directories(storage))
    if step is None and found:
        step = max(found)
    if step is None:
        raise NotFound(f"{storage.url} has no checkpoint: neither {NAME} nor {STOCK}, and no committed steps below it")
    if step not in found:
        raise NotFound(f"{storage.url} has no checkpoint of step {step}; it has {sorted(found)}")
    return OpenedCheckpoint(storage, found[step].name)


def file_at(url: str, options: Mapping[str, Any]) -> tuple[Storage, str]:
    """The folder of a file that is to be written, and the file's name."""
    try:
        folder, name = folder_and_name(url)
    except ValueError as error:
        raise UsageError(f"OUT: {error}") from error
    return opened(folder, options), name


def options_of(pairs: Sequence[tuple[str, Any]], file: str | None) -> dict[str, Any]:
    """Storage options from the command line, over those of a JSON file. No error tells any of them."""
    options: Any = {}
    if file is not None:
        try:
            with open(file, encoding="utf-8") as stream:
                options = json.load(stream)
        except ValueError:
            raise UsageError(f"{file} is not valid JSON") from None
        except OSError as error:
            raise UsageError(f"cannot read {file}: {error.strerror}") from error
        if not isinstance(options, dict):
            raise UsageError(f"{file} is no JSON object: expected storage options by their names")
    return {**options, **dict(pairs)}


def protocol_of(url: str) -> str:
    """LOCAL for paths."""
    protocol = url.partition("://")[0] if "://" in url else LOCAL
    return LOCAL if protocol == "local" else protocol
