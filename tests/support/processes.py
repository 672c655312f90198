"""Start one process per rank, and collect the JSON object that each of them reports."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
_MARK = "RESULT "


class RankFailed(RuntimeError):
    """A rank exited with an error or without a report; the message ends with what it wrote to stderr."""


def end_cleanly() -> None:
    """For the main program: have SIGTERM end it like an exception, so that it ends its ranks and removes its hosts."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))


def report(result: Mapping[str, Any]) -> None:
    """Called by a rank, once: hand ``result`` (JSON values only) to the process that started it."""
    print(_MARK + json.dumps(result), flush=True)


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_ranks(
    module: str,
    arguments: Sequence[str],
    *,
    prefixes: Sequence[Sequence[str]],
    environment: Mapping[str, str],
    timeout: float = 600.0,
) -> list[dict[str, Any]]:
    """Run ``python -m module arguments`` once per prefix and return the ranks' reports in rank order.

    ``prefixes[rank]`` is put before the command of that rank (``ip netns exec ...``; empty for none), and
    ``environment`` is added to every rank's together with RANK, WORLD_SIZE and one thread per rank. When one rank
    fails, or after ``timeout`` seconds, all are killed and ``RankFailed`` is raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes: list[subprocess.Popen[str]] = []
        try:
            for rank, prefix in enumerate(prefixes):
                env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
                env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(prefixes))}
                command = [*prefix, sys.executable, "-m", module, *arguments]
                with _stream(folder, rank, "out", "w") as out, _stream(folder, rank, "err", "w") as err:
                    processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err, text=True))
            _wait(processes, folder, timeout)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [_result(folder, rank) for rank in range(len(prefixes))]


def _stream(folder: str, rank: int, name: str, mode: str) -> IO[str]:
    return open(f"{folder}/{rank}.{name}", mode, errors="replace")


def _wait(processes: list[subprocess.Popen[str]], folder: str, timeout: float) -> None:
    """Return when every process ended well; raise as soon as one did not."""
    end = time.monotonic() + timeout
    while True:
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            raise RankFailed(f"rank {failed[0]} exited with {codes[failed[0]]}:\n{_tail(folder, failed[0])}")
        if None not in codes:
            return
        if time.monotonic() > end:
            rank = codes.index(None)
            raise RankFailed(f"rank {rank} was still running after {timeout} s:\n{_tail(folder, rank)}")
        time.sleep(0.02)


def _tail(folder: str, rank: int) -> str:
    with _stream(folder, rank, "err", "r") as stream:
        return stream.read()[-4000:]


def _result(folder: str, rank: int) -> dict[str, Any]:
    with _stream(folder, rank, "out", "r") as stream:
        found = [line.removeprefix(_MARK) for line in stream if line.startswith(_MARK)]
    if len(found) != 1:
        raise RankFailed(f"rank {rank} reported {len(found)} results instead of one:\n{_tail(folder, rank)}")
    result: dict[str, Any] = json.loads(found[0])
    return result
