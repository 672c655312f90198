"""Makes fsspec file system objects that work in any thread and after a fork, and asks them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import importlib
import inspect
import os
import threading
from collections.abc import Coroutine
from typing import Any

import fsspec
import fsspec.config
from fsspec.asyn import AsyncFileSystem
from fsspec.core import url_to_fs

from dist_asgd.checkpoint.storage.backend import Backend
from dist_asgd.checkpoint.storage.retry import Requests, StorageError
from dist_asgd.checkpoint.storage.url import Target, secrets_of
from dist_asgd.checkpoint.storage.waiting import POLL_SECONDS, check_whether_to_give_up


class FileSystems:
    """The fsspec file systems of one store: made when they are first used, and again after a fork.

    fsspec's asynchronous file systems, and those that a backend calls thread-safe, serve all threads of a process.
    Others (sftp) are made once per thread.

    Attributes:
        base: the URL of the store, as in ``Target``.
        options: of fsspec, as in ``Target``. Drivers get others, because some change what they get.
    """

    def __init__(self, target: Target, backend: Backend, kind: type) -> None:
        self.base, self.options, self._backend = target.base, target.options, backend
        self._of_driver = backend.options(target.options)
        self._is_shared = backend.is_thread_safe or issubclass(kind, AsyncFileSystem)
        # Keyed by process and thread. A child leaves its parent's objects alone: a lock in them may never be released.
        self._made: dict[tuple[int, int], Any] = {}
        self._locks: dict[tuple[int, int], threading.Lock] = {}

    def get(self) -> Any:
        """Returns the file system for the calling thread and process, making it where there is none."""
        key = self._key()
        if key not in self._made:
            with self._locks.setdefault(key, threading.Lock()):
                if key not in self._made:
                    _check_version(self._backend)
                    # fsspec's cache is bypassed: other code may change or close the file systems that are in it.
                    made = url_to_fs(self.base, skip_instance_cache=True, **self._of_driver)[0]
                    self._backend.prepare(made)
                    self._made[key] = made
        return self._made[key]

    def drop(self) -> None:
        """Drops the file system of the calling thread, which may be broken; shared ones reconnect by themselves."""
        if not self._is_shared and (broken := self._made.pop(self._key(), None)) is not None:
            self._backend.close(broken)

    def _key(self) -> tuple[int, int]:
        return os.getpid(), 0 if self._is_shared else threading.get_ident()


class Connection:
    """Asks the file system of one URL's store.

    Args:
        known: file systems of other connections, one of which is taken if it is of the same store and options; a new
            one is added. None: this connection has its own. A client of S3 takes 10 MB and a third of a second to make.
        retry_timeout: seconds after its first failure during which a request is tried again.

    Attributes:
        requests: runs requests with retries, and drops a broken connection before the next try.

    Raises:
        StorageError: fsspec does not know the protocol, or its driver is not installed.
    """

    def __init__(
        self, target: Target, backend: Backend, retry_timeout: float, known: list[FileSystems] | None = None
    ) -> None:
        kind = filesystem_class(target.protocol, backend.extra)
        alike = (one for one in known or () if (one.base, one.options) == (target.base, target.options))
        self._file_systems = next(alike, None) or FileSystems(target, backend, kind)
        if known is not None and self._file_systems not in known:
            known.append(self._file_systems)
        secrets = (*target.secrets, *secrets_of(fsspec.config.conf, backend))
        self.requests = Requests(target.url, retry_timeout, secrets, self._file_systems.drop, backend)
        with self.requests.once("open", ""):  # drivers' errors about a URL quote it
            self._root = str(kind._strip_protocol(target.base)).rstrip("/") + target.path

    def fs(self) -> Any:
        """Returns the fsspec file system for the calling thread and process, making it where there is none."""
        return self._file_systems.get()

    def call(self, method: str, *args: Any, **arguments: Any) -> Any:
        """Returns what the file system's ``method`` returns, tried once.

        Raises:
            GivenUp: a check of the calling thread has raised while an asynchronous file system was asked.
        """
        fs = self.fs()
        asynchronous: Any = getattr(fs, f"_{method}", None) if isinstance(fs, AsyncFileSystem) else None
        if asynchronous is None or not inspect.iscoroutinefunction(inspect.unwrap(asynchronous)):
            return getattr(fs, method)(*args, **arguments)
        return self.wait_for(asynchronous(*args, **arguments))

    def wait_for(self, request: Coroutine[Any, Any, Any]) -> Any:
        """Returns the result of a coroutine of an asynchronous file system; fsspec's own wait cannot be given up.

        Raises:
            GivenUp: a check of the calling thread has raised. The request is cancelled.
        """
        future = asyncio.run_coroutine_threadsafe(request, self.fs().loop)
        try:
            while not concurrent.futures.wait([future], POLL_SECONDS).done:
                check_whether_to_give_up()
        except BaseException:
            future.cancel()
            raise
        return future.result()

    def full_path(self, path: str) -> str:
        """Returns the file system's name for a path relative to the URL; "" stands for the URL itself."""
        return f"{self._root}/{path}" if path else self._root

    def relative_path(self, name: str) -> str:
        """Returns the path, relative to the URL, of a file system's name: the inverse of ``full_path``."""
        return name[len(self._root) + 1 :]

    def bucket_and_key(self, path: str) -> tuple[str, str]:
        """Returns an object store's bucket (or container) and key of a path relative to the URL."""
        bucket, key, _ = self.fs().split_path(self.full_path(path))
        return bucket, key


def filesystem_class(protocol: str, extra: str | None) -> Any:
    """Returns fsspec's class for a protocol.

    Args:
        extra: the extra of dist-asgd that installs the driver, for the error.

    Raises:
        StorageError: the driver is missing (the error says what to install), or fsspec does not know the protocol.
    """
    try:
        return fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        failure = error
    except ValueError as error:
        raise StorageError(f"{protocol}:// is not a protocol that fsspec knows") from error
    hint = f"pip install 'dist-asgd[{extra}]'" if extra else str(failure)
    raise StorageError(f"the driver for {protocol}:// is not installed: {hint}") from failure


def _check_version(backend: Backend) -> None:
    """Raises StorageError where the installed driver would overwrite a file that it is to create exclusively."""
    if backend.exclusive_since is not None:
        package, oldest = backend.exclusive_since
        version = importlib.import_module(package).__version__
        if tuple(int(number) for number in version.split(".")[: len(oldest)]) < oldest:
            raise StorageError(
                f"{package} {version} cannot create a file exclusively: pip install -U 'dist-asgd[{backend.extra}]'"
            )
