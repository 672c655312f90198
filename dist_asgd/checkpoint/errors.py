"""Defines the errors of saving and loading checkpoints, and raises an error of one rank on all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dist_asgd.comm.consensus import Agreement, error_text, same_on_all_ranks
from dist_asgd.comm.roll_call import RankMissing


class CheckpointError(Exception):
    """A checkpoint could not be saved or loaded. The message names the file and the key, and says what to do."""


class NotCommitted(CheckpointError):
    """Files of a checkpoint exist without its commit record: its save never finished, or it is being deleted."""


@same_on_all_ranks
class DamagedCheckpoint(CheckpointError):
    """A checkpoint was committed, and is not whole any more: bytes or files of it are missing or have changed."""


class RankUnresponsive(CheckpointError, RankMissing):
    """Another rank, or the key-value store by which ranks talk during a save, gives no sign of life."""


class NoCheckpoint(CheckpointError):
    """There is no checkpoint at a URL, or nothing else that was asked for there."""


@contextlib.contextmanager
def together(agreement: Agreement, operation: str) -> Iterator[None]:
    """Runs the block on every rank; if it raises on any rank, every rank raises an error that names that rank.

    Collective: every rank of ``agreement`` must call it. A rank that is interrupted (``KeyboardInterrupt``,
    ``SystemExit``) raises that itself.

    Args:
        agreement: the ranks.
        operation: the public call that runs the block, such as ``"save()"``.

    Raises:
        ValueError, TypeError, DamagedCheckpoint: the lowest failing rank raised one.
        CheckpointError: the lowest failing rank raised any other exception, or was interrupted.
    """
    with only_checkpoint_errors(), agreement.together(operation):
        yield


@contextlib.contextmanager
def only_checkpoint_errors() -> Iterator[None]:
    """Turns every ``Exception`` of the block into ``CheckpointError``, but for ``ValueError`` and ``TypeError``.

    An error without a message gets one that has its type and the line that raised it.
    """
    try:
        yield
    except Exception as error:
        kind = next((kind for kind in (ValueError, TypeError) if isinstance(error, kind)), CheckpointError)
        if isinstance(error, kind) and str(error).strip():
            raise
        raise kind(error_text(error)) from error


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Puts ``what``, such as a checkpoint's URL, in front of the message of a ``CheckpointError`` of the block."""
    try:
        yield
    except CheckpointError as error:
        kind = DamagedCheckpoint if isinstance(error, DamagedCheckpoint) else CheckpointError
        raise kind(f"{what}: {error}") from error.__cause__
