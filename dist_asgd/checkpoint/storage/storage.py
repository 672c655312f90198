"""Reads, writes and lists the files below one URL, local or of any fsspec protocol.

Checkpoints access storage through ``Storage`` only, which knows nothing of tensors or checkpoints. Local files go by
plain system calls (storage/posix.py), remote ones through fsspec (storage/remote.py). Requests are
retried after transient errors (storage/retry.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from dist_asgd.checkpoint.storage.connection import FileSystems
from dist_asgd.checkpoint.storage.registry import Store, store_of, target_of
from dist_asgd.checkpoint.storage.retry import RETRY_TIMEOUT, RequestCounts, StorageError, checked_timeout
from dist_asgd.checkpoint.storage.store import BytesLike
from dist_asgd.checkpoint.storage.url import checked_path
from dist_asgd.checkpoint.storage.waiting import threads

__all__ = ["Storage", "StorageError"]

READS = 24  # concurrent requests: at 40 ms each, 600 small files take under 2 s
READ_BYTES = 32 * 2**20  # that are being read or wait to be taken; the allocator was seen to hold twice as many


class Storage:
    """The files below one URL.

    No method is collective. Every method blocks, and any number of threads, ranks and hosts may call the methods at
    once. An object made before a fork works in the child, too. Paths are relative to the URL, with "/" between their
    parts. No error contains credentials.

    Attributes:
        url: the URL for messages, without user, password and query.

    Raises:
        ValueError: a path is unsafe: absolute, or with "..", empty parts, backslashes, wildcards or control characters.
        FileNotFoundError: a file that is to be read does not exist.
        FileExistsError: a file that is to be created exists.
        StorageError: the store failed for good, or for longer than ``retry_timeout`` where the error was transient.
    """

    def __init__(self, url: str, store: Store) -> None:
        self.url = url
        self._store = store

    @classmethod
    def open(
        cls,
        url: str | os.PathLike[str],
        options: Mapping[str, Any] | None = None,
        *,
        retry_timeout: float = RETRY_TIMEOUT,
        known: list[FileSystems] | None = None,
    ) -> Storage:
        """Returns the files below ``url``. Makes no request, so nothing has to exist there.

        Args:
            url: a local path (may be relative, or begin with "~"), or a URL of any fsspec protocol: file://,
                memory://, s3://, gs://, abfs://, az://, sftp:// and others.
            options: fsspec's storage options for the protocol, such as credentials.
            retry_timeout: seconds after its first failure during which a request is tried again; 0 for one try.
            known: file systems that URLs of one store and options share, which this call may use and add to. None:
                the URL has a file system of its own.

        Raises:
            ValueError: the URL cannot hold checkpoints (chained, with a query), a local path is given options, or
                ``retry_timeout`` is no such number.
            StorageError: the protocol is unknown to fsspec, or its driver is not installed.
        """
        target = target_of(url, options)
        return cls(target.url, store_of(target, checked_timeout(retry_timeout), known))

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    @property
    def request_counts(self) -> RequestCounts:
        """The counts of requests that failed in this process."""
        return self._store.request_counts

    @property
    def is_local(self) -> bool:
        """Whether the operating system caches what was read, so that reading it again costs nothing."""
        return self._store.is_local

    def create(self, path: str, data: bytes) -> None:
        """Creates a small file, and raises FileExistsError where there is one. Of several callers exactly one succeeds.

        Readers see the whole file or none, and the file is durable when this returns. Exceptions: where fsspec knows no
        exclusive create (storage/rename.py), the last of several concurrent callers wins, and durability is up to the
        server; on local file systems without hard links, readers may see a part.
        """
        self._store.create(checked_path(path), bytes(data))

    def write(self, path: str, chunks: Iterable[BytesLike]) -> int:
        """Writes a file of any size, replacing one of that name, and returns its size in bytes.

        The file appears when it is whole and durable. It does not appear if anything fails or ``chunks`` raises, whose
        errors pass unchanged.

        Args:
            chunks: the file's bytes. A chunk may be overwritten as soon as the next one is asked for. Memory is bounded
                but on memory://, whatever the sizes of the chunks.
        """
        return self._store.write(checked_path(path), chunks)

    def read(self, path: str) -> bytes:
        """Returns the bytes of a whole file, which should be small."""
        return self._store.read_range(checked_path(path), 0, None)

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> Iterator[tuple[int, bytes]]:
        """Reads parts of files, each by one request, many at once.

        Args:
            ranges: (path, start, stop): bytes ``[start, stop)`` of the file at ``path``.

        Yields:
            (index into ``ranges``, the bytes of that range), in any order.

        Raises:
            ValueError: a range is not ``0 <= start <= stop``; raised by the call, before the first is read.
            StorageError: a file ends before ``stop``.
        """
        for path, start, stop in ranges:
            if not 0 <= start <= stop:
                raise ValueError(f"expected 0 <= start <= stop, got [{start}, {stop}) of {path!r}")
            checked_path(path)
        return self._read_ranges(ranges)

    def _read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> Iterator[tuple[int, bytes]]:
        """Reads ahead while ranges that are being read or not yet taken have ``READ_BYTES``, or are a single one."""
        if len(ranges) == 1:  # threads have memory of their own that the allocator keeps
            yield 0, self._read_range(*ranges[0])
            return
        lengths = [stop - start for _, start, stop in ranges]
        pending: dict[Future[bytes], int] = {}
        held = following = 0
        with threads(min(READS, len(ranges)) or 1, "dist_asgd-read") as pool:
            while pending or following < len(ranges):
                while following < len(ranges) and len(pending) < READS:
                    if pending and held + lengths[following] > READ_BYTES:
                        break
                    pending[pool.submit(self._read_range, *ranges[following])] = following
                    held += lengths[following]
                    following += 1
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                future = done.pop()
                index = pending.pop(future)
                yield index, future.result()
                held -= lengths[index]

    def _read_range(self, path: str, start: int, stop: int) -> bytes:
        data = self._store.read_range(path, start, stop) if stop > start else b""
        if len(data) != stop - start:
            raise StorageError(
                f"{self.url}/{path} is shorter than expected: bytes [{start}, {stop}) were asked for, {len(data)} came"
            )
        return data

    def list(self, path: str = "") -> dict[str, int | None]:
        """Returns the names directly below ``path``: sizes of files in bytes, None for folders; {} where nothing is.

        Nothing is there only if the store has answered so: a missing bucket, like any other failure, is an error.
        """
        return self._store.entries(checked_path(path, may_be_empty=True))

    def is_file(self) -> bool:
        """Returns whether the URL itself is a file."""
        return self._store.is_file()

    def sizes(self, path: str = "") -> dict[str, int]:
        """Returns the sizes in bytes of all files below ``path``, at any depth, by their paths relative to ``path``.

        {} where nothing is. If any folder cannot be listed, that is an error, as for ``list``.
        """
        return self._store.sizes(checked_path(path, may_be_empty=True))

    def remove(self, path: str) -> None:
        """Removes a file, which need not exist."""
        self._store.remove(checked_path(path))

    def remove_tree(self, path: str) -> None:
        """Removes everything at and below ``path``, which need not exist."""
        self._store.remove_tree(checked_path(path))

    def abort_uploads(self, prefix: str, older_than: float) -> int:
        """Clears away unfinished files of killed writers: multipart uploads and temporary files.

        Args:
            prefix: the folder below which they are removed; "" for the URL.
            older_than: seconds. Younger ones stay, because their writers may be alive.

        Returns:
            The number of files removed; 0 where a store clears up by itself.
        """
        return self._store.abort_uploads(checked_path(prefix, may_be_empty=True), older_than)

    def modified(self, path: str) -> float | None:
        """Returns when a file, or the latest file of a folder, was changed, in seconds since the epoch.

        Returns None where the store does not say, or nothing exists.
        """
        return self._store.modified(checked_path(path, may_be_empty=True))
