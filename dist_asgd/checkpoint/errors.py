"""Errors of checkpoints, and the ways in which one rank's error becomes the error of every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dist_asgd.comm.consensus import Agreement, error_text


class CheckpointError(Exception):
    """A checkpoint could not be saved or loaded. Says which file and which key, and what to do."""


class NotCommitted(CheckpointError):
    """Something of a checkpoint is there, but it never was finished, or is being deleted: it does not exist."""


@contextlib.contextmanager
def together(agreement: Agreement, operation: str) -> Iterator[None]:
    """Runs ``agreement.together`` and makes ``CheckpointError`` of its errors but ``ValueError`` and ``TypeError``.

    Collective: every rank must run it. A rank that is interrupted raises its own ``KeyboardInterrupt`` or such.
    """
    with only_checkpoint_errors(), agreement.together(operation):
        yield


@contextlib.contextmanager
def only_checkpoint_errors() -> Iterator[None]:
    """What goes wrong in the block is a ``CheckpointError``, but for a user's ``ValueError`` or ``TypeError``."""
    try:
        yield
    except (CheckpointError, ValueError, TypeError):
        raise
    except Exception as error:
        raise CheckpointError(error_text(error)) from error


@contextlib.contextmanager
def naming(url: str) -> Iterator[None]:
    """Tells which checkpoint an error is about."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{url}: {error}") from error.__cause__
