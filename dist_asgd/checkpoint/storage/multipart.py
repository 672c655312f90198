"""Large files for object stores: equal parts, several under way at once, in bounded memory; all of them or nothing."""

from __future__ import annotations

import contextlib
import io
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from dist_asgd.checkpoint.storage.store import BytesLike

PART = 14 * 2**20  # bytes; the last part may be shorter. With 16, a save took 129 MB of memory
PARTS_AT_ONCE = 3


class Multipart(ABC):
    """One file under way to an object store, which shows it when it is finished."""

    @abstractmethod
    def send(self, number: int, data: io.BytesIO) -> None:
        """Part ``number``, from 1; by any thread. ``data`` is read from its beginning."""

    @abstractmethod
    def finish(self, parts: int, size: int) -> None: ...

    @abstractmethod
    def abort(self) -> None: ...


def upload(chunks: Iterable[BytesLike], put: Callable[[io.BytesIO], None], begin: Callable[[], Multipart]) -> int:
    """Sends a file by one request (``put``) if it is no longer than a part, else by parts. Returns its bytes."""
    pieces = equal_pieces(chunks, PART)
    first = next(pieces, io.BytesIO())
    second = next(pieces, None)
    if second is None:
        put(first)
        return length(first)
    multipart = begin()
    try:
        with ThreadPoolExecutor(PARTS_AT_ONCE, thread_name_prefix="dist_asgd-write") as pool:
            parts, size = _send(multipart, itertools.chain([first, second], pieces), pool)
        multipart.finish(parts, size)
    except BaseException:
        with contextlib.suppress(Exception):  # the store may be gone: abort_uploads() finds it later
            multipart.abort()
        raise
    return size


def _send(multipart: Multipart, pieces: Iterator[io.BytesIO], pool: ThreadPoolExecutor) -> tuple[int, int]:
    """(number of parts, their bytes). After an error none is under way."""
    pending: set[Future[None]] = set()
    number = size = 0
    try:
        for piece in pieces:
            number, size = number + 1, size + length(piece)
            pending.add(pool.submit(multipart.send, number, piece))
            del piece  # or one more than necessary is kept while the next is made
            if len(pending) == PARTS_AT_ONCE:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
        for future in pending:
            future.result()
    finally:
        wait(pending)
    return number, size


def equal_pieces(chunks: Iterable[BytesLike], size: int) -> Iterator[io.BytesIO]:
    """The same bytes cut into pieces of ``size``, each copied once; the last may be shorter.

    They are files in memory, because aiohttp sends those in small parts but makes two copies of plain bytes.
    """
    piece = io.BytesIO()
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        while view:
            room = size - piece.tell()
            piece.write(view[:room])
            view = view[room:]
            if piece.tell() == size:
                yield piece
                piece = io.BytesIO()
    if piece.tell():
        yield piece


def from_start(piece: io.BytesIO) -> io.BytesIO:
    """For another try."""
    piece.seek(0)
    return piece


def length(piece: io.BytesIO) -> int:
    return piece.getbuffer().nbytes
