"""Ends the waiting for answers of stores early: when other ranks have failed, or the process is interrupted."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import TypeAlias

Check: TypeAlias = Callable[[], None]

POLL_SECONDS = 0.25  # between two checks of whether to give up
TIDY_SECONDS = 5.0  # for requests that tidy up after an error

_thread = threading.local()


class GivenUp(BaseException):
    """A check of the thread that waits for a request has raised ``reason``. Drivers catch no ``BaseException``."""

    def __init__(self, reason: BaseException) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _checks() -> tuple[Check, ...]:
    """Returns the checks of the calling thread."""
    found: tuple[Check, ...] = getattr(_thread, "checks", ())
    return found


def _set_checks(checks: tuple[Check, ...]) -> None:
    _thread.checks = checks


@contextlib.contextmanager
def _checking(checks: tuple[Check, ...]) -> Iterator[None]:
    before = _checks()
    _set_checks(checks)
    try:
        yield
    finally:
        _set_checks(before)


def giving_up_when(check: Check) -> contextlib.AbstractContextManager[None]:
    """Calls ``check`` while a request of the block waits for an answer or its next try; what it raises ends these.

    The check is called in this thread, and in ``threads`` that the block starts.
    """
    return _checking((*_checks(), check))


def check_whether_to_give_up() -> None:
    """Raises ``GivenUp`` if a check of the calling thread raises. Whoever waits calls it every ``POLL_SECONDS``."""
    for check in _checks():
        try:
            check()
        except BaseException as reason:
            raise GivenUp(reason) from None


@contextlib.contextmanager
def raising_the_reason() -> Iterator[None]:
    """Raises, in place of a ``GivenUp`` of the block, what the check has raised."""
    try:
        yield
    except GivenUp as given_up:
        reason = given_up.reason
    else:
        return
    raise reason


@contextlib.contextmanager
def tidying_up() -> Iterator[None]:
    """Hides errors of the block, and ends its requests after ``TIDY_SECONDS``: the error that counts came before."""
    end = time.monotonic() + TIDY_SECONDS

    def check() -> None:
        if time.monotonic() > end:
            raise TimeoutError

    with contextlib.suppress(Exception), raising_the_reason(), _checking((check,)):
        yield


def pause(seconds: float) -> None:
    """Waits. Raises ``GivenUp`` if a check of the calling thread raises."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check_whether_to_give_up()
        time.sleep(min(left, POLL_SECONDS))


@contextlib.contextmanager
def threads(count: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Yields an executor of ``count`` threads that make requests.

    When the block raises, an interrupt for example, requests that are not begun are cancelled, and those that wait for
    an answer or their next try are given up. All threads have ended when this returns.
    """
    stopped = threading.Event()

    def check() -> None:
        if stopped.is_set():
            raise CancelledError("another request failed, or the process was interrupted")

    with ThreadPoolExecutor(count, name, initializer=_set_checks, initargs=((*_checks(), check),)) as pool:
        try:
            yield pool
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
