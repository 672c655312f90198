"""Uploads large files to object stores in equal parts, several at once, in bounded memory, or not at all."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Protocol

from dist_asgd.checkpoint.storage.store import BytesLike
from dist_asgd.checkpoint.storage.waiting import threads, tidying_up

PART = 14 * 2**20  # bytes; the last part may be shorter. Parts of 16 MiB made a save take 129 MB of memory
PARTS_AT_ONCE = 3
LONGEST_PUT = 2**20  # bytes, for clients that copy the data of a put: longer files go in parts


class Multipart(Protocol):
    """The unfinished upload of one file, which the store shows when it is finished."""

    def send(self, number: int, data: io.BytesIO) -> None:
        """Sends part ``number``, counted from 1. Several threads may call it. ``data`` is read from its beginning."""

    def finish(self, parts: int, size: int) -> None:
        """Makes the file visible. ``parts`` is the number of parts, ``size`` the file's bytes."""

    def abort(self) -> None:
        """Discards the parts that were sent."""


def upload(chunks: Iterable[BytesLike], put: Callable[[io.BytesIO], None], begin: Callable[[], Multipart]) -> int:
    """Uploads a file: by one request if it is no longer than a part, else in parts. Returns its size in bytes.

    Args:
        chunks: the file's bytes; a chunk may be overwritten as soon as the next one is asked for.
        put: uploads the whole file.
        begin: starts an upload in parts.
    """
    pieces = split_into_parts(chunks, PART)
    first = next(pieces, io.BytesIO())
    second = next(pieces, None)
    if second is None:
        put(first)
        return length(first)
    multipart = begin()
    try:
        with threads(PARTS_AT_ONCE, "dist_asgd-write") as pool:
            parts, size = _send(multipart, itertools.chain([first, second], pieces), pool)
        multipart.finish(parts, size)
    except BaseException:
        with tidying_up():  # the store may not answer: abort_uploads() finds the upload later
            multipart.abort()
        raise
    return size


def _send(multipart: Multipart, pieces: Iterator[io.BytesIO], pool: ThreadPoolExecutor) -> tuple[int, int]:
    """Sends all parts and returns their number and bytes."""
    pending: set[Future[None]] = set()
    number = size = 0
    for piece in pieces:
        number, size = number + 1, size + length(piece)
        pending.add(pool.submit(multipart.send, number, piece))
        del piece  # otherwise its memory is kept while the next part is made
        if len(pending) == PARTS_AT_ONCE:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
    for future in pending:
        future.result()
    return number, size


def split_into_parts(chunks: Iterable[BytesLike], size: int) -> Iterator[io.BytesIO]:
    """Yields the bytes of ``chunks`` in parts of ``size`` bytes, each copied once; the last may be shorter.

    Parts are files in memory, because aiohttp sends these a little at a time but makes two copies of plain bytes.
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


def rewound(piece: io.BytesIO) -> io.BytesIO:
    """Returns ``piece``, to be read from its beginning; an earlier try may have read a part of it."""
    piece.seek(0)
    return piece


def length(piece: io.BytesIO) -> int:
    return piece.getbuffer().nbytes
