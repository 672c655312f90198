"""A store seen through a proxy, a process of its own, that counts what passes and can delay every request.

A request that waits for "100 Continue" before it sends its body goes to and fro twice, and is delayed twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tests.support.processes import ROOT

METHODS = (b"GET ", b"PUT ", b"POST ", b"HEAD ", b"DELETE ")


@dataclass
class Traffic:
    """What has passed so far, as the store saw it: bytes with their HTTP headers."""

    requests: int = 0
    received: int = 0  # bytes, by the store
    sent: int = 0  # bytes, by the store

    def since(self, before: Traffic) -> Traffic:
        return Traffic(self.requests - before.requests, self.received - before.received, self.sent - before.sent)


@dataclass(frozen=True)
class Proxy:
    """A running one: where it listens, and where it tells what has passed."""

    port: int
    control: int

    def traffic(self) -> Traffic:
        with socket.create_connection(("127.0.0.1", self.control)) as connection, connection.makefile() as answer:
            return Traffic(**json.load(answer))


@contextlib.contextmanager
def proxied(address: tuple[str, int], options: Mapping[str, Any], delay: float) -> Iterator[tuple[Proxy, Any]]:
    """A proxy in front of the store at ``address``, and its fsspec ``options``, that go through the proxy.

    Args:
        delay: seconds that each request waits.
    """
    command = [sys.executable, "-m", "tests.support.counting_proxy", *map(str, address), str(delay)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            proxy = Proxy(*json.loads(process.stdout.readline()))
            yield proxy, json.loads(json.dumps(options).replace(f":{address[1]}", f":{proxy.port}"))
        finally:
            process.kill()


class _Server:
    """The proxy's own process."""

    def __init__(self, address: tuple[str, int], delay: float) -> None:
        self._address, self._delay = address, delay
        self._traffic = Traffic()

    async def run(self) -> None:
        servers = [await asyncio.start_server(each, "127.0.0.1", 0) for each in (self._serve, self._tell)]
        print(json.dumps([server.sockets[0].getsockname()[1] for server in servers]), flush=True)
        await asyncio.gather(*(server.serve_forever() for server in servers))

    async def _tell(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps(asdict(self._traffic)).encode())
        await writer.drain()
        writer.close()

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        store, to_store = await asyncio.open_connection(*self._address)
        turn = _Turn()
        await asyncio.gather(self._ask(client, to_store, turn), self._answer(store, to_client, turn))

    async def _ask(self, client: asyncio.StreamReader, to_store: asyncio.StreamWriter, turn: _Turn) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await client.read(2**18):
                self._traffic.received += len(data)
                if turn.is_the_clients:
                    turn.is_the_clients = False
                    self._traffic.requests += data.startswith(METHODS)
                    await asyncio.sleep(self._delay)
                to_store.write(data)
                await to_store.drain()
        to_store.close()

    async def _answer(self, store: asyncio.StreamReader, to_client: asyncio.StreamWriter, turn: _Turn) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await store.read(2**18):
                self._traffic.sent += len(data)
                turn.is_the_clients = True
                to_client.write(data)
                await to_client.drain()
        to_client.close()


@dataclass
class _Turn:
    """Whose it is to speak on a connection; nobody sends a request before the last was answered."""

    is_the_clients: bool = True


if __name__ == "__main__":
    asyncio.run(_Server((sys.argv[1], int(sys.argv[2])), float(sys.argv[3])).run())
