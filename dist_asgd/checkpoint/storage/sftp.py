"""Stores files on SFTP servers through fsspec's sftp driver (paramiko)."""

from __future__ import annotations

from typing import Any

from dist_asgd.checkpoint.storage.backend import Backend, classes_in
from dist_asgd.checkpoint.storage.rename import RenamedStore


class SftpStore(RenamedStore):
    """Changes files on an SFTP server. Only one of several concurrent creates of a file succeeds (OpenSSH)."""

    backend = Backend(
        protocols=("sftp", "ssh"),
        extra="sftp",
        user_options=("username", "password"),
        transient_errors=classes_in("paramiko.ssh_exception", "NoValidConnectionsError", "SSHException"),
        permanent_errors=classes_in("paramiko.ssh_exception", "AuthenticationException", "BadHostKeyException"),
    )

    def _rename_new(self, old: str, new: str) -> None:
        """Renames by SFTP's own request, which spares an existing file (OpenSSH makes a hard link)."""
        fs = self._connection.fs()
        try:
            fs.ftp.rename(old, new)
        except OSError as error:
            if isinstance(error, FileNotFoundError | PermissionError) or not fs.exists(new):
                raise
            raise FileExistsError from error

    def _open_new(self, name: str) -> Any:
        file = super()._open_new(name)
        file.set_pipelined(True)  # writes do not wait for the answer to the write before
        return file
