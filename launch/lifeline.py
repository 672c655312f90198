"""Connections by which each rank learns at once that the process of another one has ended.

The kernel closes the connections of a process that ends, however it ends. Those of a process that is slow or stopped
stay open, and so do those of a host that has lost its power or its link.
"""

import contextlib
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator

GRACE = 0.5  # seconds in which a rank may still end by an error of its own, which few have
GREETING_BYTES = 16
GOODBYE = b"."  # sent by a rank that leaves in good order


class Lifeline:
    """A connection between rank 0 and each other rank. When one of them is closed, rank 0 closes all.

    In the block of `watched`, a signal ends this rank if another rank has ended, before the signal or after it. Nothing
    can be saved then, and what the rank waits for (a collective, a rank's share of a checkpoint, a connection inside of
    torch) would keep it until torchrun kills it, after 30 s. A signal alone changes nothing.

    Args:
        rank: of this process; rank 0 begins to listen.
        size: number of ranks.
        host: by which every rank reaches rank 0.
        signals: numbers of signals that have handlers in Python.
    """

    def __init__(self, rank: int, size: int, host: str, signals: Collection[int]) -> None:
        self._rank, self._host, self._signals = rank, host, frozenset(signals)
        self._peers: set[socket.socket] = set()
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._greeting = secrets.token_bytes(GREETING_BYTES)
        self._signalled = self._ended = self._closing = False
        self._deadline: float | None = None
        if rank == 0:
            family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
            self._listener = socket.create_server(("", 0), family=family, backlog=size)
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    @property
    def ticket(self) -> bytes:
        """What the other ranks need to connect: a port, and a greeting by which rank 0 tells them from strangers."""
        port = 0 if self._listener is None else self._listener.getsockname()[1]
        return port.to_bytes(2, "big") + self._greeting

    def connect(self, ticket: bytes) -> None:
        """Connects this rank, which is not rank 0. Raises `OSError`."""
        port = int.from_bytes(ticket[:2], "big")
        peer = socket.create_connection((self._host, port), timeout=10)
        peer.sendall(ticket[2:])
        self._keep(peer)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Watches the connections and the signals during the block. Called once, in the main thread."""
        woken, waker = socket.socketpair()
        woken.setblocking(False)
        waker.setblocking(False)
        self._selector.register(woken, selectors.EVENT_READ, self._woken)
        former = signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        thread.start()
        try:
            yield
            for peer in list(self._peers):
                with contextlib.suppress(OSError):
                    peer.send(GOODBYE)
        finally:
            signal.set_wakeup_fd(former)
            self._closing = True
            waker.send(b"\0")
            thread.join()
            self._drop_all()
            for each in (woken, waker):
                each.close()

    def _watch(self) -> None:
        while not self._closing:
            left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            for key, _ in self._selector.select(left):
                react: Callable[[socket.socket], None] = key.data
                react(key.fileobj)  # type: ignore[arg-type]  # only sockets are registered
            if self._signalled and self._ended and self._deadline is None:
                self._deadline = time.monotonic() + GRACE
            if self._deadline is not None and time.monotonic() >= self._deadline and not self._closing:
                text = f"Rank {self._rank} ends, and saves nothing: a signal asks for it, and another rank has ended."
                print(text, file=sys.stderr, flush=True)
                os._exit(1)  # the main thread may be inside of torch for a long time

    def _woken(self, woken: socket.socket) -> None:
        self._signalled |= not self._signals.isdisjoint(woken.recv(4096))

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            peer, _ = listener.accept()
            peer.settimeout(1)
            try:
                is_rank = secrets.compare_digest(peer.recv(GREETING_BYTES), self._greeting)
            except OSError:
                is_rank = False
            if is_rank:
                self._keep(peer)
            else:
                peer.close()

    def _keep(self, peer: socket.socket) -> None:
        peer.setblocking(False)
        self._peers.add(peer)
        self._selector.register(peer, selectors.EVENT_READ, self._heard)

    def _heard(self, peer: socket.socket) -> None:
        if peer not in self._peers:
            return  # dropped since the selector has named it
        try:
            said = peer.recv(1)
        except OSError:
            said = b""
        if said == GOODBYE:
            self._drop(peer)
        else:
            self._ended = True
            self._drop_all()

    def _drop(self, peer: socket.socket) -> None:
        self._peers.discard(peer)
        self._selector.unregister(peer)
        peer.close()

    def _drop_all(self) -> None:
        """Closes all connections: where a rank has ended, this tells it to the others."""
        for peer in list(self._peers):
            self._drop(peer)
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None
