"""A save that is under way in a thread, and that a process which ends finishes first."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor  # noqa: F401 its hook must be there before ours: see below

from dist_asgd.checkpoint.errors import CheckpointError

logger = logging.getLogger(__name__)


class Background:
    """Runs ``work`` in a thread."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._done = threading.Event()
        self._process = os.getpid()
        _under_way.add(self)
        threading.Thread(target=self._run, name="dist_asgd checkpoint", daemon=False).start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error
        finally:
            self._done.set()

    def join(self) -> None:
        """Waits until the work is done, or has failed."""
        if self._process == os.getpid():  # a fork does not have the thread
            self._done.wait()  # Thread.join, once interrupted, takes the thread for stopped (CPython up to 3.12)

    def finish(self) -> None:
        """Waits; raises what went wrong."""
        self.join()
        _under_way.discard(self)
        if self._error is not None:
            raise CheckpointError(f"the last save, in the background, has failed: {self._error}") from self._error

    def end(self) -> None:
        """Waits; what went wrong goes to the log, since nobody is there to whom it could be raised."""
        try:
            self.finish()
        except CheckpointError as error:
            logger.error("%s", error)


_under_way: set[Background] = set()


def _end_all() -> None:
    """A process that ends by itself, by an exception or by a signal that it handles, has all of its saves."""
    for background in list(_under_way):
        background.end()


# Functions of atexit are called when executors take no more work, and threads that are no daemons are waited for then,
# too: a save would fail half way. Of these hooks the last one comes first, and that of executors is older.
threading._register_atexit(_end_all)  # type: ignore[attr-defined]  # there is no public way
