"""What was read and found whole, on its way to live tensors."""

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
    """Bytes of a store that wait in a temporary file until all ranks have verified theirs. Used as a context manager.

    So neither memory nor the network has to take them twice.

    Args:
        size: bytes that may have to wait.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._spool = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._spool.close()

    def _keep(self, data: BytesLike) -> int:
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


class Verified(Spool, ABC):
    """What one rank reads of a checkpoint for itself. Bytes of a local file do not wait: they are read a second time.

    Args:
        size: bytes that are read.
    """

    def __init__(self, storage: Storage, directory: str, size: int) -> None:
        super().__init__(size)
        self._storage, self._directory = storage, directory

    @abstractmethod
    def read(self, progress: Progress) -> None:
        """Reads and verifies everything. Changes nothing. Raises ``CheckpointError``."""

    @abstractmethod
    def apply(self, progress: Progress) -> None:
        """Writes everything to where it belongs."""
