"""Spooled reads: verified bytes wait in a temporary file until all ranks have verified theirs."""

from __future__ import annotations

import errno
import tempfile
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.progress import Progress
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.checkpoint.storage.store import BytesLike

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on

IN_MEMORY = 2**24  # bytes that wait in memory; more wait in a temporary file


class Spool:
    """A temporary file for verified bytes. Used as a context manager, which deletes the file.

    With it, a load from a remote store takes neither twice the memory of the tensors nor twice the traffic.

    Args:
        size: bytes that may be spooled, for the error message of a full disk.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._spool = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._spool.close()

    def _append(self, data: BytesLike) -> int:
        """Appends ``data``, and returns its position for ``_read_back``. Raises ``CheckpointError`` for a full disk."""
        position = self._spool.tell()
        try:
            self._spool.write(data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise CheckpointError(
                f"{tempfile.gettempdir()} has no room for the {self.size} bytes that this rank reads: they wait there "
                "until all ranks have verified theirs. Let TMPDIR name a larger directory"
            ) from error
        return position

    def _read_back(self, position: int, size: int) -> bytes:
        self._spool.seek(position)
        return self._spool.read(size)


class VerifiedRead(Spool, ABC):
    """The bytes of a checkpoint that one rank reads for itself, in two phases: ``read`` verifies, ``apply`` copies.

    From a remote store, ``read`` spools the bytes. A local file is read again by ``apply`` instead, and verified again.

    Args:
        size: bytes that are read.
    """

    def __init__(self, storage: Storage, directory: str, size: int) -> None:
        super().__init__(size)
        self._storage, self._directory = storage, directory

    @abstractmethod
    def read(self, progress: Progress) -> None:
        """Reads and verifies all bytes. Changes no tensor. Raises ``CheckpointError`` if any are damaged."""

    @abstractmethod
    def apply(self, progress: Progress) -> None:
        """Copies everything to its live tensors. Called once, after ``read`` has returned on all ranks."""
