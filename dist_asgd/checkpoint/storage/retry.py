"""Requests to a store: again after transient errors, and errors that name the file but no credentials."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

Result = TypeVar("Result")

TRIES = 5
FIRST_DELAY = 0.25  # seconds; each further one is three times as long, together at most 10 s
HTTP_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
CODES_TRANSIENT = {"ConditionalRequestConflict", "OperationAborted", "RequestTimeout", "SlowDown"}
ERRNO_TRANSIENT = {
    errno.EAGAIN,
    errno.EBUSY,  # s3fs: 503 and 409
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ESTALE,
    getattr(errno, "EREMOTEIO", errno.EAGAIN),  # s3fs: 500
}
# Classes of the drivers by name, so that none has to be imported, which takes a second.
CLASSES_TRANSIENT = {
    "aiohttp.client_exceptions.ClientConnectionError",
    "aiohttp.client_exceptions.ClientPayloadError",
    "azure.core.exceptions.IncompleteReadError",
    "azure.core.exceptions.ServiceRequestError",
    "azure.core.exceptions.ServiceResponseError",
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.ReadTimeoutError",
    "botocore.exceptions.ResponseStreamingError",
    "botocore.parsers.ResponseParserError",
    "google.auth.exceptions.TransportError",
    "paramiko.ssh_exception.NoValidConnectionsError",
    "paramiko.ssh_exception.SSHException",
    "requests.exceptions.ConnectionError",  # gcsfs: 502
}
CLASSES_PERMANENT = {
    "aiohttp.client_exceptions.ClientSSLError",
    "aiohttp.client_exceptions.InvalidURL",
    "botocore.exceptions.SSLError",
    "paramiko.ssh_exception.AuthenticationException",
    "paramiko.ssh_exception.BadHostKeyException",
}


class StorageError(OSError):
    """A request to a store failed for good. It names the operation, the URL without credentials and the cause."""


@dataclass(frozen=True)
class Requests:
    """How one store is asked.

    Attributes:
        url: what errors call it; without credentials.
        secrets: texts that no error may contain.
        forget: called before another try: drops a connection that may be broken.
    """

    url: str
    secrets: tuple[str, ...] = field(default=(), repr=False)
    forget: Callable[[], None] = lambda: None

    def again(self, operation: str, path: str, request: Callable[[], Result]) -> Result:
        """What ``request`` returns, at most ``TRIES`` times tried; otherwise the error to tell."""
        failure: Exception
        for number in range(1, TRIES + 1):
            try:
                return request()
            except Exception as error:
                failure = error
            if number == TRIES or not is_transient(failure):
                break
            time.sleep(FIRST_DELAY * 3 ** (number - 1) * random.uniform(0.5, 1))
            self.forget()
        raise self.told(operation, path, failure, number)

    @contextlib.contextmanager
    def once(self, operation: str, path: str) -> Iterator[None]:
        """For a block that cannot be run a second time."""
        try:
            yield
            return
        except Exception as error:
            failure = error
        raise self.told(operation, path, failure, 1)

    def told(self, operation: str, path: str, error: Exception, tries: int) -> Exception:
        """``error`` in our words and with it as cause; FileNotFoundError and FileExistsError keep their class."""
        if isinstance(error, StorageError):
            return error
        where = f"{self.url}/{path}" if path else self.url
        told: OSError
        if isinstance(error, FileNotFoundError) and operation == "read":  # in other cases a bucket is missing
            told = FileNotFoundError(errno.ENOENT, "no such file", where)
        elif isinstance(error, FileExistsError):
            told = FileExistsError(errno.EEXIST, "the file exists already", where)
        else:
            text = self.cleaned(str(error).strip())
            text = f"{type(error).__name__}: {text}" if text else type(error).__name__
            text = f"could not {operation} {where}{f' in {tries} tries' if tries > 1 else ''}: {text}"
            number = error.errno if isinstance(error, OSError) else None
            told = StorageError(text) if number is None else StorageError(number, text)
        told.__cause__ = self._cause(error)
        return told

    def cleaned(self, text: str) -> str:
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text

    def _cause(self, error: Exception) -> Exception:
        """The error itself, so that its traceback is seen, unless anything in its chain tells a secret."""
        whole = "".join(traceback.format_exception(error))
        if any(secret in whole for secret in self.secrets):
            return StorageError(self.cleaned(f"{type(error).__name__}: {error}"))
        return error


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later."""
    if isinstance(error, FileNotFoundError | FileExistsError | PermissionError):
        return False
    for link in _chain(error):
        names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(link).__mro__}
        if names & CLASSES_PERMANENT:
            return False
        if isinstance(link, ConnectionError | TimeoutError | asyncio.TimeoutError | EOFError):
            return True
        if names & CLASSES_TRANSIENT or (isinstance(link, OSError) and link.errno in ERRNO_TRANSIENT):
            return True
        status, code = _http_answer(link)
        if status in HTTP_TRANSIENT or code in CODES_TRANSIENT:
            return True
    return False


def statuses(error: BaseException) -> set[int | None]:
    """HTTP statuses in an error and its causes."""
    return {_http_answer(link)[0] for link in _chain(error)}


def _http_answer(error: BaseException) -> tuple[int | None, str | None]:
    """HTTP status and the store's own error code, where botocore, azure, gcsfs and aiohttp put them."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode"), response.get("Error", {}).get("Code")
    for name in ("status_code", "status", "code"):
        status = getattr(error, name, None)
        if isinstance(status, int):
            return status, None
    return None, None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes."""
    link: BaseException | None = error
    for _ in range(10):  # a chain may be a circle
        if link is None:
            return
        yield link
        link = link.__cause__
