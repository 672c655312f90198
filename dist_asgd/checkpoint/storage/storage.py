"""The files below one URL, local or on any fsspec target: the only way in which checkpoints touch storage.

It knows nothing of tensors or checkpoints. Local files go by plain system calls (posix.py), everything else through
fsspec (storage/remote.py, storage/uploads.py). Transient errors are tried again (storage/retry.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from dist_asgd.checkpoint.storage.posix import LocalStore
from dist_asgd.checkpoint.storage.registry import store_of
from dist_asgd.checkpoint.storage.retry import StorageError
from dist_asgd.checkpoint.storage.store import BytesLike, Store
from dist_asgd.checkpoint.storage.url import checked_path, target_of

__all__ = ["Storage", "StorageError"]

READS = 24  # requests at once: with 40 ms each, 600 small files take under 2 s
READ_BYTES = 32 * 2**20  # under way or not yet taken, together; up to twice as many were seen in the allocator


class Storage:
    """The files below one URL.

    Every method blocks, and any number of threads, ranks and hosts may call them at once. An object made before a fork
    serves the child too. Paths are relative to the URL, with "/" between their parts; unsafe ones ("..", absolute ones,
    empty parts, backslashes, wildcards, control characters) raise ValueError. Whatever a store does not do after some
    tries raises ``StorageError``, an ``OSError``; a file that is missing or in the way, FileNotFoundError and
    FileExistsError. No error contains credentials.

    Attributes:
        url: for people: without user, password and query.
    """

    def __init__(self, url: str, store: Store) -> None:
        self.url = url
        self._store = store

    @classmethod
    def open(cls, url: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> Storage:
        """Makes no request yet, so nothing has to be there.

        Args:
            url: a local path (relative, or with "~"), or a URL of any fsspec protocol: file://, memory://, s3://,
                abfs://, az://, sftp:// and others.
            options: fsspec's storage options for it.
        """
        target = target_of(url, options)
        return cls(target.url, store_of(target))

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    @property
    def is_local(self) -> bool:
        """Whether what was read once is read again at no cost: then the operating system has it."""
        return isinstance(self._store, LocalStore)

    def create(self, path: str, data: bytes) -> None:
        """A small new file, unless there is one: then FileExistsError. Of several callers exactly one succeeds.

        Nobody reads a part of it, and it is durable when this returns (but see ``RenamedUploads``).
        """
        self._store.create(checked_path(path), bytes(data))

    def write(self, path: str, chunks: Iterable[BytesLike]) -> int:
        """A file of any size, in bounded memory; one of that name is replaced. Returns its bytes.

        It appears when it is whole and durable; if anything fails, or ``chunks`` raises, it does not. A chunk may be
        overwritten as soon as the next one is asked for.
        """
        return self._store.write(checked_path(path), chunks)

    def read(self, path: str) -> bytes:
        """A whole file, for small ones."""
        return self._store.read(checked_path(path))

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> Iterator[tuple[int, bytes]]:
        """Parts of files, each by one request, many at once.

        Args:
            ranges: (path, start, stop): bytes ``[start, stop)``.

        Yields:
            (index into ``ranges``, its bytes), in any order. A file that ends before ``stop`` is an error.
        """
        for path, start, stop in ranges:
            if not 0 <= start <= stop:
                raise ValueError(f"expected 0 <= start <= stop, got [{start}, {stop}) of {path!r}")
            checked_path(path)
        return self._read_ranges(ranges)

    def _read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> Iterator[tuple[int, bytes]]:
        """Reads ahead while what is under way or not yet taken is within ``READ_BYTES``, or is a single range."""
        lengths = [stop - start for _, start, stop in ranges]
        pending: dict[Future[bytes], int] = {}
        held = following = 0
        pool = ThreadPoolExecutor(min(READS, len(ranges)) or 1, thread_name_prefix="dist_asgd-read")
        try:
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
        finally:
            pool.shutdown(cancel_futures=True)

    def _read_range(self, path: str, start: int, stop: int) -> bytes:
        data = self._store.read_range(path, start, stop) if stop > start else b""
        if len(data) != stop - start:
            raise StorageError(
                f"{self.url}/{path} is shorter than expected: bytes [{start}, {stop}) were asked for, {len(data)} came"
            )
        return data

    def list(self, path: str = "") -> dict[str, int | None]:
        """Names directly below ``path``, with the size of files and None for folders; {} where nothing is."""
        return self._store.entries(checked_path(path, may_be_empty=True))

    def sizes(self, path: str = "") -> dict[str, int]:
        """Sizes of all files below ``path``, however deep, by their paths relative to it."""
        return self._store.sizes(checked_path(path, may_be_empty=True))

    def remove(self, path: str) -> None:
        """A file; it need not be there."""
        self._store.remove(checked_path(path))

    def remove_tree(self, path: str) -> None:
        """Everything at and below ``path``, which need not be there."""
        self._store.remove_tree(checked_path(path))

    def abort_uploads(self, prefix: str, older_than: float) -> int:
        """Clears away what killed writers left below the folder ``prefix``: multipart uploads, temporary files.

        Args:
            older_than: seconds; younger ones stay, because their writers may live.

        Returns:
            How many there were; 0 where a store clears up by itself.
        """
        return self._store.abort_uploads(checked_path(prefix, may_be_empty=True), older_than)

    def modified(self, path: str) -> float | None:
        """When a file, or the latest file of a folder, was changed, in seconds since the epoch. None: unknown."""
        return self._store.modified(checked_path(path, may_be_empty=True))
