"""Runs requests to a store: retries after transient errors, and errors that name the file but no credentials.

[Note: retries]
A request that fails is tried again until ``retry_timeout`` seconds after its first failure, whatever number of tries
that is, because an outage lasts minutes and not tries. The pauses between tries double up to ``LONGEST_PAUSE``; each is
drawn at random, so that many ranks do not ask at one time. An error that time does not heal, such as a refused
credential, is raised at once. A request without an answer fails after ``TIMEOUT``, which is longer than the 30 s that a
busy store may take, and then counts as one try.

A save that another rank has ended, or an interrupt, ends the waiting earlier (storage/waiting.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dist_asgd.checkpoint.storage.backend import Backend, classes_in
from dist_asgd.checkpoint.storage.url import redacted
from dist_asgd.checkpoint.storage.waiting import pause, raising_the_reason

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

RETRY_TIMEOUT = 300.0  # seconds; half of the time after which NCCL by default ends ranks that wait for a collective
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 15.0  # seconds between two tries
LOG_SECONDS = 10.0  # between two warnings about one store: many requests may fail at one time
TIMEOUT = 60  # seconds without an answer after which a driver gives a request up; for connecting, too
HTTP_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
# s3fs raises EBUSY for the HTTP statuses 503 and 409, and EREMOTEIO, which not every system has, for 500.
ERRNO_TRANSIENT = {errno.EAGAIN, errno.EBUSY, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ESTALE}
ERRNO_TRANSIENT |= {getattr(errno, "EREMOTEIO", errno.EAGAIN)}
# Exception classes of libraries that several drivers use, by name, because importing them takes a second. Classes of
# one store stand in its own module. gcsfs raises requests' ConnectionError for the status 502.
CLASSES_TRANSIENT = classes_in("aiohttp.client_exceptions", "ClientConnectionError", "ClientPayloadError")
CLASSES_TRANSIENT |= classes_in("requests.exceptions", "ConnectionError")
CLASSES_PERMANENT = classes_in("aiohttp.client_exceptions", "ClientSSLError", "InvalidURL")


class StorageError(OSError):
    """A request to a store failed for good. It names the operation, the URL without credentials and the cause."""


@dataclass(frozen=True)
class Requests:
    """Runs the requests to one store.

    Attributes:
        url: the store's URL for errors; without credentials.
        timeout: seconds after its first failure during which a request is tried again.
        secrets: texts that no error may contain; they are replaced by "***".
        drop_connection: called before another try, to drop a connection that may be broken.
        backend: says which errors of the store's driver are transient.
        counts: of the tries that failed.
    """

    url: str
    timeout: float
    secrets: tuple[str, ...] = field(default=(), repr=False)
    drop_connection: Callable[[], None] = lambda: None
    backend: Backend = field(default_factory=Backend)
    counts: RequestCounts = field(default_factory=lambda: RequestCounts(), repr=False)
    _log: WarningLog = field(default_factory=lambda: WarningLog(), repr=False)

    def retry(self, operation: str, path: str, request: Callable[[], Result]) -> Result:
        """Calls ``request`` until it succeeds, as [Note: retries] says, and returns what it returns.

        Args:
            operation: what the request does, for errors: "could not <operation> <URL>/<path>".
            path: the file that the request is about, relative to the URL.

        Raises:
            FileNotFoundError: a file that was to be read does not exist.
            FileExistsError: the request raised it.
            StorageError: every other failure; its cause is the last error.
        """
        begun, end, tries = time.monotonic(), math.inf, 0
        with raising_the_reason():
            while True:
                tries += 1
                try:
                    return request()
                except Exception as error:
                    failure = error
                now = time.monotonic()
                end = min(end, now + self.timeout)
                if now >= end or not is_transient(failure, self.backend):
                    break
                self.counts.add(retried=1)
                self._log.tell(self._told(operation, path, failure), tries, now - begun, end - now)
                pause(min(random.uniform(0.5, 1) * pause_after(tries), end - now))
                self.drop_connection()
        raise self._explained(operation, path, failure, tries, time.monotonic() - begun)

    @contextlib.contextmanager
    def once(self, operation: str, path: str) -> Iterator[None]:
        """Runs a block that cannot be run a second time; its errors become those that ``retry`` raises."""
        try:
            with raising_the_reason():
                yield
            return
        except Exception as error:
            failure = error
        raise self._explained(operation, path, failure, 1, 0.0)

    def _explained(self, operation: str, path: str, error: Exception, tries: int, seconds: float) -> Exception:
        """Returns the error that users see, with ``error`` as its cause; ``retry`` lists the classes."""
        if isinstance(error, StorageError):
            return error
        where = self._where(path)
        explained: OSError
        # Listings of stores catch the FileNotFoundError of a missing folder: one that arrives here is the bucket's.
        is_unlisted = isinstance(error, FileNotFoundError) and operation == "list"
        if is_unlisted or error_codes(error) & self.backend.missing_container_codes:
            explained = StorageError(
                errno.ENOENT, f"could not {operation} {where}: the bucket or container does not exist. Make it first"
            )
        elif isinstance(error, FileNotFoundError) and operation == "read":
            explained = FileNotFoundError(errno.ENOENT, "no such file", where)
        elif isinstance(error, FileExistsError):
            explained = FileExistsError(errno.EEXIST, "the file exists already", where)
        else:
            text = self._told(operation, path, error)
            text += f" ({tries} tries in {seconds:.0f} s)" if tries > 1 else ""
            number = error.errno if isinstance(error, OSError) else None
            explained = StorageError(text) if number is None else StorageError(number, text)
        if isinstance(explained, StorageError):  # a file that is missing, or there already, is an answer
            self.counts.add(failed=1)
        explained.__cause__ = self._cause(error)
        return explained

    def _told(self, operation: str, path: str, error: Exception) -> str:
        """Returns in words what has failed and why, without credentials."""
        text = self._redacted(str(error).strip())
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
        return f"could not {operation} {self._where(path)}: {text}"

    def _where(self, path: str) -> str:
        return f"{self.url}/{path}" if path else self.url

    def _redacted(self, text: str) -> str:
        return redacted(text, self.secrets)

    def _cause(self, error: Exception) -> Exception:
        """Returns ``error``, for its traceback, or its text alone where it, or one that it came of, has a secret."""
        whole = "\n".join(f"{link}\n{link!r}\n{link.args!r}\n{vars(link)!r}" for link in _everything_behind(error))
        if self._redacted(whole) != whole:
            return StorageError(self._redacted(f"{type(error).__name__}: {error}"))
        return error


class RequestCounts:
    """Counts, from any thread, the tries of requests to one store that were made again and the requests that failed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.retried = 0  # tries that failed and were followed by another
        self.failed = 0  # requests that were given up

    def add(self, *, retried: int = 0, failed: int = 0) -> None:
        """Adds to the counts."""
        with self._lock:
            self.retried += retried
            self.failed += failed


class WarningLog:
    """Logs warnings about one store, at most one in ``LOG_SECONDS``: many requests fail at one time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = 0.0

    def tell(self, what: str, tries: int, since: float, left: float) -> None:
        """Logs that a request is tried again.

        Args:
            what: the request, and why it failed.
            tries: how often it has failed.
            since: seconds since its first try.
            left: seconds after which it is given up.
        """
        with self._lock:
            if (now := time.monotonic()) < self._next:
                return
            self._next = now + LOG_SECONDS
        until = time.strftime("%H:%M:%S", time.localtime(time.time() + left))
        logger.warning("%s (failed %d times in %.0f s; retrying until %s, for %.0f s)", what, tries, since, until, left)


def pause_after(tries: int) -> float:
    """Returns the longest pause, in seconds, after a number of failed tries."""
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(tries - 1, 30))


def checked_timeout(seconds: object) -> float:
    """Returns a ``retry_timeout``, in seconds. Raises ``ValueError`` unless it is a finite number of at least 0."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        raise ValueError(f"retry_timeout must be a finite number of seconds, at least 0, got {seconds!r}")
    return float(seconds)


def is_transient(error: BaseException, backend: Backend) -> bool:
    """Returns whether the request that raised ``error`` may succeed a moment later."""
    if isinstance(error, FileNotFoundError | FileExistsError | PermissionError):
        return False
    for link in _chain(error):
        names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(link).__mro__}
        if any(text in str(link) for text in backend.transient_texts):
            return True
        if names & (CLASSES_PERMANENT | backend.permanent_errors):
            return False
        if any(text in str(link) for text in backend.permanent_texts):
            return False
        if isinstance(link, ConnectionError | TimeoutError | asyncio.TimeoutError | EOFError):
            return True
        if names & (CLASSES_TRANSIENT | backend.transient_errors):
            return True
        if isinstance(link, OSError) and link.errno in ERRNO_TRANSIENT:
            return True
        status, code = _http_answer(link)
        if status in HTTP_TRANSIENT or code in backend.transient_codes:
            return True
    return False


def http_statuses(error: BaseException) -> set[int | None]:
    """Returns the HTTP statuses of an error and its causes; None stands for an error without one."""
    return {_http_answer(link)[0] for link in _chain(error)}


def error_codes(error: BaseException) -> set[str | None]:
    """Returns the store's own codes of an error and its causes, such as "NoSuchBucket"; None stands for no code."""
    return {_http_answer(link)[1] for link in _chain(error)}


def _http_answer(error: BaseException) -> tuple[int | None, str | None]:
    """Returns the HTTP status and the store's error code, from where botocore, azure, gcsfs and aiohttp keep them."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode"), response.get("Error", {}).get("Code")
    code = getattr(error, "error_code", None)  # azure's: a str, or an Enum of them
    code = None if code is None else str(getattr(code, "value", code))
    for name in ("status_code", "status", "code"):
        status = getattr(error, name, None)
        if isinstance(status, int):
            return status, code
    return None, code


def _everything_behind(error: BaseException) -> list[BaseException]:
    """Returns the error, its causes and contexts, hidden ones too, and the members of groups, at most a hundred."""
    found, waiting = list[BaseException](), [error]
    while waiting and len(found) < 100:
        link = waiting.pop()
        if not any(link is known for known in found):
            found.append(link)
            members = getattr(link, "exceptions", ())  # of an ExceptionGroup, which Python has from 3.11 on
            waiting += [other for other in (link.__cause__, link.__context__, *members) if other is not None]
    return found


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yields the error and its causes, at most ten, because a chain of causes may be circular."""
    link: BaseException | None = error
    for _ in range(10):
        if link is None:
            return
        yield link
        link = link.__cause__
