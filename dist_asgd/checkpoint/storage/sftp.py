"""Stores files on SFTP servers through fsspec's sftp driver (paramiko)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping
from typing import Any

from dist_asgd.checkpoint.storage.backend import Backend, classes_in
from dist_asgd.checkpoint.storage.connection import Connection
from dist_asgd.checkpoint.storage.multipart import length, split_into_parts
from dist_asgd.checkpoint.storage.rename import RenamedStore, write_to
from dist_asgd.checkpoint.storage.retry import TIMEOUT
from dist_asgd.checkpoint.storage.store import BytesLike, temporary_path
from dist_asgd.checkpoint.storage.waiting import TIDY_SECONDS, tidying_up

PIECE = 4 * 2**20  # bytes whose arrival is awaited before more are sent
TIMEOUTS = ("timeout", "banner_timeout", "auth_timeout", "channel_timeout")  # of paramiko's connect()


def sftp_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options for fsspec's driver, which passes them to paramiko's connect()."""
    from dist_asgd.checkpoint.storage.ssh_transport import LimitedTransport

    return {**dict.fromkeys(TIMEOUTS, TIMEOUT), "transport_factory": LimitedTransport, **options}


def prepare_sftp(fs: Any) -> None:
    """Has every request wait no longer than ``TIMEOUT`` for its answer. paramiko waits without limit."""
    from dist_asgd.checkpoint.storage.ssh_transport import LimitedTransport

    fs.ftp.get_channel().settimeout(TIMEOUT)
    transport = fs.client.get_transport()
    if isinstance(transport, LimitedTransport):  # an option of the user may name another
        transport.is_ready()


class SftpStore(RenamedStore):
    """Changes files on an SFTP server. Only one of several concurrent creates of a file succeeds (OpenSSH)."""

    backend = Backend(
        protocols=("sftp", "ssh"),
        extra="sftp",
        user_options=("username", "password"),
        options=sftp_options,
        prepare=prepare_sftp,
        close=lambda fs: fs.client.close(),
        transient_errors=classes_in("paramiko.ssh_exception", "NoValidConnectionsError", "SSHException"),
        permanent_errors=classes_in("paramiko.ssh_exception", "AuthenticationException", "BadHostKeyException"),
        # paramiko raises an OSError without a number for a lost connection.
        transient_texts=frozenset({"Socket is closed", "Authentication timeout", "transport shut down or saw EOF"}),
        permanent_texts=frozenset({"not found in known_hosts", "No authentication methods available"}),
    )

    def write(self, path: str, chunks: Iterable[BytesLike]) -> int:
        """Writes a temporary file and renames it. After a lost connection it goes on with the piece that it cut."""
        file = SftpFile(self._connection, path)
        self.retry("write", path, lambda: self._make_folder(self._connection.full_path(path).rpartition("/")[0]))
        count = 0
        try:
            self.retry("write", path, lambda: file.put(0, b""))  # there may be no chunk
            for piece in split_into_parts(chunks, PIECE):
                self.retry("write", path, functools.partial(file.put, count, piece.getbuffer()))
                count += length(piece)
            self.retry("write", path, lambda: self._publish(file, path, count))
        except BaseException:
            with tidying_up():
                for name in file.names:
                    self._discard(name)
            raise
        return count

    def _publish(self, file: SftpFile, path: str, count: int) -> None:
        """Renames the temporary file, which has ``count`` bytes, to ``path``."""
        fs, target = self._connection.fs(), self._connection.full_path(path)
        file.close()
        try:
            self._check_size(file.name, count)
            fs.mv(file.name, target)
        except FileNotFoundError:  # perhaps renamed by an earlier try, whose answer was lost
            self._check_size(target, count)

    def _discard(self, name: str) -> None:
        """Removes a file, if it exists, with little patience: the connection may be silent."""
        ftp = self._connection.fs().ftp
        ftp.get_channel().settimeout(TIDY_SECONDS)
        with contextlib.suppress(FileNotFoundError):
            ftp.remove(name)
        ftp.get_channel().settimeout(TIMEOUT)

    def _make_folder(self, folder: str) -> None:
        """Makes a folder and its parents, also where others make some of them at the same time."""
        if self._is_folder(folder):
            return
        self._make_folder(folder.rpartition("/")[0] or "/")
        try:
            self._connection.fs().ftp.mkdir(folder)
        except OSError:
            if not self._is_folder(folder):
                raise

    def _rename_new(self, old: str, new: str) -> None:
        """Renames by SFTP's own request, which spares an existing file (OpenSSH makes a hard link)."""
        fs = self._connection.fs()
        try:
            fs.ftp.rename(old, new)
        except OSError as error:
            if isinstance(error, FileNotFoundError | PermissionError | TimeoutError):
                raise
            with contextlib.suppress(FileNotFoundError):
                fs.info(new)
                raise FileExistsError from error
            raise


class SftpFile:
    """A temporary file beside a path, of which a lost connection loses nothing but the piece that was being written.

    Attributes:
        names: the file system's names of the file and of those that were begun before it, the file's last.
    """

    def __init__(self, connection: Connection, path: str) -> None:
        self._connection, self._path = connection, path
        self.names: list[str] = []
        self._fs: Any = None  # the file system, which is one connection, that has opened the file
        self._file: Any = None

    @property
    def name(self) -> str:
        return self.names[-1]

    def put(self, start: int, piece: BytesLike) -> None:
        """Writes ``piece`` at the offset ``start``. Returns when the server has acknowledged all of it."""
        fs = self._connection.fs()
        if self._fs is not fs:
            if not start:
                # A new name for each try: a server that was stopped may carry out an earlier try's request later, which
                # makes the file of that name empty.
                self.names.append(self._connection.full_path(temporary_path(self._path)))
            self._file = fs.ftp.open(self.name, "r+b" if start else "wb")
            self._fs = fs
        self._file.seek(start)
        self._file.set_pipelined(True)  # writes do not wait for the answer to the write before
        write_to(self._file, memoryview(piece)[:-1])
        self._file.set_pipelined(False)  # the last write waits for all answers
        write_to(self._file, memoryview(piece)[-1:])

    def close(self) -> None:
        """Closes the file, if the connection that has opened it still serves."""
        if self._fs is self._connection.fs():
            self._file.close()
        self._fs = None
