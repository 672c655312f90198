"""Defines the errors of saving and loading checkpoints, and raises an error of one rank on all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dist_asgd.comm.consensus import Agreement


class CheckpointError(Exception):
    """A checkpoint could not be saved or loaded. The message names the file and the key, and says what to do."""


class NotCommitted(CheckpointError):
    """Files of a checkpoint exist without its commit record: its save never finished, or it is being deleted."""


@contextlib.contextmanager
def together(agreement: Agreement, operation: str) -> Iterator[None]:
    """Runs a block on every rank of ``agreement``; if it raised on any rank, raises on every rank. Collective.

    A rank on which the block is interrupted (``KeyboardInterrupt`` and other exceptions that are no ``Exception``) tells
    the other ranks before it raises what interrupted it.

    Args:
        agreement: the ranks.
        operation: what the block does, for errors.

    Raises:
        ValueError, TypeError: the block raised it, on the first rank on which it failed.
        CheckpointError: the block raised any other exception, or was interrupted on another rank.
    """
    own: BaseException | None = None
    with only_checkpoint_errors():
        try:
            with agreement.together(operation):
                try:
                    yield
                except Exception as error:
                    own = error
                    raise
                except BaseException as error:
                    own = error
                    raise CheckpointError(f"{operation} was interrupted by {type(error).__name__}") from error
        except Exception as error:
            if own is not None and not isinstance(own, Exception):
                raise own from None
            if own is None or own in (error, error.__cause__):
                raise
            raise CheckpointError(f"{own}. Nor could ranks tell one another so: {error}") from own


@contextlib.contextmanager
def only_checkpoint_errors() -> Iterator[None]:
    """Turns every ``Exception`` of the block into ``CheckpointError``, but for ``ValueError`` and ``TypeError``."""
    try:
        yield
    except (CheckpointError, ValueError, TypeError):
        raise
    except Exception as error:
        raise CheckpointError(str(error)) from error


@contextlib.contextmanager
def naming(url: str) -> Iterator[None]:
    """Puts the checkpoint's ``url`` in front of the message of a ``CheckpointError`` that the block raises."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{url}: {error}") from error.__cause__
