"""A save in a background thread, which a process that exits finishes first."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor  # noqa: F401 registers its exit hook before ours: see the end

from dist_asgd.checkpoint.errors import CheckpointError, RankUnresponsive
from dist_asgd.comm.consensus import error_text

logger = logging.getLogger(__name__)


class BackgroundSave:
    """Runs ``work`` in a non-daemon thread, starting at once. Is not collective itself.

    In a forked child, which does not have the thread, no method waits.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._done = threading.Event()
        self._process = os.getpid()
        _running.add(self)
        threading.Thread(target=self._run, name="dist_asgd checkpoint", daemon=False).start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error
        finally:
            self._done.set()

    def wait(self) -> None:
        """Waits until the work has returned or raised. Raises nothing of what it raised."""
        if self._process == os.getpid():
            # Thread.join, once interrupted, takes the thread for stopped (CPython up to 3.12).
            self._done.wait()

    def wait_and_raise(self) -> None:
        """Waits for the work. Raises ``CheckpointError``, maybe ``RankUnresponsive``, if the work raised."""
        self.wait()
        _running.discard(self)
        if self._error is not None:
            kind = RankUnresponsive if isinstance(self._error, RankUnresponsive) else CheckpointError
            raise kind(f"the last save, in the background, has failed: {error_text(self._error)}") from self._error

    def wait_and_log(self) -> None:
        """Waits for the work. Logs an error of the work, for callers that have nobody to raise it to."""
        try:
            self.wait_and_raise()
        except CheckpointError as error:
            logger.error("%s", error)


_running: set[BackgroundSave] = set()


def _finish_all() -> None:
    """Finishes all saves of a process that ends normally, by an exception, or by a signal that it handles."""
    for save in list(_running):
        save.wait_and_log()


# atexit is too late: by then executors accept no more work, and the interpreter has waited for non-daemon threads, so a
# save would fail half way. Hooks registered here run in reverse order; importing ThreadPoolExecutor registered the hook
# that shuts down executors, so this one runs before it.
threading._register_atexit(_finish_all)  # type: ignore[attr-defined]  # there is no public way
