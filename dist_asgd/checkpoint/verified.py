"""What was read and found whole, on its way to live tensors."""

from __future__ import annotations

import errno
import tempfile
from abc import ABC, abstractmethod

from dist_asgd.checkpoint.entries import CheckpointError
from dist_asgd.checkpoint.progress import Progress
from dist_asgd.checkpoint.storage import Storage
from dist_asgd.checkpoint.stores import Chunk

IN_MEMORY = 2**24  # bytes that wait in memory; more wait in a temporary file


class Verified(ABC):
    """What one rank reads of a checkpoint. Used as a context manager.

    Bytes of a store wait in a temporary file until all ranks have verified theirs, so that neither memory nor the
    network has to take them twice. Those of a local file are read, and verified, a second time.

    Args:
        size: bytes that are read, and may have to wait.
    """

    def __init__(self, storage: Storage, directory: str, size: int) -> None:
        self._storage, self._directory, self.size = storage, directory, size
        self._spool = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115

    def __enter__(self) -> Verified:
        return self

    def __exit__(self, *error: object) -> None:
        self._spool.close()

    @abstractmethod
    def read(self, progress: Progress) -> None:
        """Reads and verifies everything. Changes nothing. Raises ``CheckpointError``."""

    @abstractmethod
    def apply(self, progress: Progress) -> None:
        """Writes everything to where it belongs."""

    def _keep(self, data: Chunk) -> int:
        """Returns where ``_kept`` finds it."""
        at = self._spool.tell()
        try:
            self._spool.write(data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise CheckpointError(
                f"{tempfile.gettempdir()} has no room for the {self.size} bytes that this rank reads: they wait there "
                "until all ranks have verified theirs. Let TMPDIR name a larger directory"
            ) from error
        return at

    def _kept(self, at: int, size: int) -> bytes:
        self._spool.seek(at)
        return self._spool.read(size)
