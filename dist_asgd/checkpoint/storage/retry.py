"""Runs requests to a store: retries after transient errors, and errors that name the file but no credentials."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dist_asgd.checkpoint.storage.backend import Backend, classes_in
from dist_asgd.checkpoint.storage.url import redacted

Result = TypeVar("Result")

TRIES = 5
FIRST_DELAY = 0.25  # seconds before the second try; each further delay is three times as long, together at most 10 s
CONNECT_TIMEOUT, READ_TIMEOUT = 5, 30  # seconds, for drivers that would wait for minutes
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
        secrets: texts that no error may contain; they are replaced by "***".
        drop_connection: called before another try, to drop a connection that may be broken.
        backend: says which errors of the store's driver are transient.
    """

    url: str
    secrets: tuple[str, ...] = field(default=(), repr=False)
    drop_connection: Callable[[], None] = lambda: None
    backend: Backend = field(default_factory=Backend)

    def retry(self, operation: str, path: str, request: Callable[[], Result]) -> Result:
        """Calls ``request``, up to ``TRIES`` times while its errors are transient, and returns what it returns.

        Args:
            operation: what the request does, for errors: "could not <operation> <URL>/<path>".
            path: the file that the request is about, relative to the URL.

        Raises:
            FileNotFoundError: a file that was to be read does not exist.
            FileExistsError: the request raised it.
            StorageError: every other failure; its cause is the last error.
        """
        failure: Exception
        for number in range(1, TRIES + 1):
            try:
                return request()
            except Exception as error:
                failure = error
            if number == TRIES or not is_transient(failure, self.backend):
                break
            time.sleep(FIRST_DELAY * 3 ** (number - 1) * random.uniform(0.5, 1))
            self.drop_connection()
        raise self._explained(operation, path, failure, number)

    @contextlib.contextmanager
    def once(self, operation: str, path: str) -> Iterator[None]:
        """Runs a block that cannot be run a second time; its errors become those that ``retry`` raises."""
        try:
            yield
            return
        except Exception as error:
            failure = error
        raise self._explained(operation, path, failure, 1)

    def _explained(self, operation: str, path: str, error: Exception, tries: int) -> Exception:
        """Returns the error that users see, with ``error`` as its cause; ``retry`` lists the classes."""
        if isinstance(error, StorageError):
            return error
        where = f"{self.url}/{path}" if path else self.url
        explained: OSError
        if isinstance(error, FileNotFoundError) and operation == "read":  # other operations: the bucket is missing
            explained = FileNotFoundError(errno.ENOENT, "no such file", where)
        elif isinstance(error, FileExistsError):
            explained = FileExistsError(errno.EEXIST, "the file exists already", where)
        else:
            text = self._redacted(str(error).strip())
            text = f"{type(error).__name__}: {text}" if text else type(error).__name__
            text = f"could not {operation} {where}{f' in {tries} tries' if tries > 1 else ''}: {text}"
            number = error.errno if isinstance(error, OSError) else None
            explained = StorageError(text) if number is None else StorageError(number, text)
        explained.__cause__ = self._cause(error)
        return explained

    def _redacted(self, text: str) -> str:
        return redacted(text, self.secrets)

    def _cause(self, error: Exception) -> Exception:
        """Returns ``error``, for its traceback, or its text alone where it, or one that it came of, has a secret."""
        whole = "\n".join(f"{link}\n{link!r}\n{link.args!r}\n{vars(link)!r}" for link in _everything_behind(error))
        if self._redacted(whole) != whole:
            return StorageError(self._redacted(f"{type(error).__name__}: {error}"))
        return error


def is_transient(error: BaseException, backend: Backend) -> bool:
    """Returns whether the request that raised ``error`` may succeed a moment later."""
    if isinstance(error, FileNotFoundError | FileExistsError | PermissionError):
        return False
    for link in _chain(error):
        names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(link).__mro__}
        if names & (CLASSES_PERMANENT | backend.permanent_errors):
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


def _http_answer(error: BaseException) -> tuple[int | None, str | None]:
    """Returns the HTTP status and the store's error code, from where botocore, azure, gcsfs and aiohttp keep them."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode"), response.get("Error", {}).get("Code")
    for name in ("status_code", "status", "code"):
        status = getattr(error, name, None)
        if isinstance(status, int):
            return status, None
    return None, None


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
