"""An SSH connection that ends where the other side does not answer. Imports paramiko, so import it inside functions."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any

import paramiko

from dist_asgd.checkpoint.storage.retry import TIMEOUT


class LimitedTransport(paramiko.Transport):
    """Closes itself where paramiko would wait without limit, which ends all that waits for it with an error.

    These are: the answer that opens SFTP on a new channel, and a server that takes no more bytes.
    """

    def __init__(self, sock: Any, *args: Any, **arguments: Any) -> None:
        super().__init__(sock, *args, **arguments)
        self.handshake_timeout = TIMEOUT  # paramiko's 15 s are fewer than a busy server may take
        self._limit: threading.Timer | None = None
        with contextlib.suppress(AttributeError, OSError):  # Linux has it; a proxy command is no socket
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(TIMEOUT * 1000))

    def open_session(self, *args: Any, **arguments: Any) -> paramiko.Channel:
        channel = super().open_session(*args, **arguments)
        channel.settimeout(TIMEOUT)
        self._limit = threading.Timer(2 * TIMEOUT, self.close)  # the channel's timeout does not hold for all answers
        self._limit.daemon = True
        self._limit.start()
        return channel

    def is_ready(self) -> None:
        """Ends the limit on the time that opening SFTP may take. Called when that has succeeded."""
        if self._limit is not None:
            self._limit.cancel()
