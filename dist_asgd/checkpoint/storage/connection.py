"""File system objects of fsspec, for any thread and after a fork."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.core import url_to_fs

from dist_asgd.checkpoint.storage.retry import Requests, StorageError
from dist_asgd.checkpoint.storage.url import Target

EXTRAS = {"s3": "s3", "s3a": "s3", "abfs": "azure", "abfss": "azure", "az": "azure", "gs": "gcs", "gcs": "gcs"}
EXTRAS |= {"sftp": "sftp", "ssh": "sftp"}


class Connection:
    """One file system of fsspec, made when it is first asked for, anew after a fork, and in each thread if need be.

    fsspec's asynchronous file systems and the one in memory serve several threads; of the others (sftp) each thread has
    its own.

    Args:
        options: for fsspec.
        prepare: called with each new file system.
    """

    def __init__(
        self, target: Target, options: Mapping[str, Any], prepare: Callable[[Any], None] = lambda fs: None
    ) -> None:
        self._target = target
        self._options = options
        self._prepare = prepare
        kind = filesystem_class(target.protocol)
        self._shared = issubclass(kind, AsyncFileSystem) or target.protocol == "memory"
        # By process and thread: those of a parent process are left alone, a lock among them may never be released.
        self._made: dict[tuple[int, int], Any] = {}
        self._locks: dict[tuple[int, int], threading.Lock] = {}
        self._root = str(kind._strip_protocol(target.full)).rstrip("/")
        self.requests = replace(Requests(target.url, target.secrets), forget=self.forget)

    def fs(self) -> Any:
        key = self._key()
        if key not in self._made:
            with self._locks.setdefault(key, threading.Lock()):
                if key not in self._made:
                    # Not from fsspec's cache: what others do to their file system (sessions, settings) is not ours.
                    made = url_to_fs(self._target.full, skip_instance_cache=True, **self._options)[0]
                    self._prepare(made)
                    self._made[key] = made
        return self._made[key]

    def at(self, path: str) -> str:
        """A relative path as the file system has it."""
        return f"{self._root}/{path}" if path else self._root

    def forget(self) -> None:
        """The connection of this thread may be broken: make another one. Shared ones reconnect by themselves."""
        if not self._shared:
            self._made.pop(self._key(), None)

    def _key(self) -> tuple[int, int]:
        return os.getpid(), 0 if self._shared else threading.get_ident()


def filesystem_class(protocol: str) -> Any:
    """fsspec's class for a protocol; StorageError tells what to install, or that there is none."""
    try:
        return fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        failure, extra = error, EXTRAS.get(protocol)
    except ValueError as error:
        raise StorageError(f"{protocol}:// is not a protocol that fsspec knows") from error
    hint = f"pip install 'dist-asgd[{extra}]'" if extra else str(failure)
    raise StorageError(f"the driver for {protocol}:// is not installed: {hint}") from failure
