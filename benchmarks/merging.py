"""Merges of checkpoints: wall time beside plain reading of the inputs in the same run, bytes read, resident memory.

    python -m benchmarks.merging

The sources are checkpoints of one step each, of float32 or bfloat16 weights in tensors of 32 MB, with an optimizer's
state beside them that a merge does not read. The target is a checkpoint. S3 is SeaweedFS on this machine.

- time: contestants in turns. "read" takes the bytes of the weights, and nothing else, in ranges of 8 MiB, by as many
  requests at once as the library makes, and drops them. "copy" does that and writes those of one source to one file,
  made durable, since a merge has to write as much. Pages of local files are dropped from memory before each turn, where
  the table does not say "in memory". CPU seconds are the process's own, without those of the server of S3.
- bytes: what the process read by read(2) during the merge, over the weights of all sources (local files).
- memory: growth of a fresh process's resident memory during the merge, at its highest, after a small merge that
  imports everything.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch

import dist_asgd
from benchmarks.quiet import undisturbed
from benchmarks.table import print_table, write_json_lines
from dist_asgd.checkpoint.format.manifest import MANIFEST, read_manifest
from dist_asgd.checkpoint.loading.ranges import READ_BYTES
from dist_asgd.checkpoint.storage.connection import FileSystems
from dist_asgd.checkpoint.storage.storage import Storage
from tests.support.memory import peak_resident, reset_peak
from tests.support.processes import end_cleanly, report, start_ranks

EACH = 32 * 10**6  # bytes of a tensor
COLUMNS = {
    "store": "store",
    "dtype": "dtype",
    "sources": "sources",
    "megabytes": "MB each",
    "merge": "merge, s",
    "read": "read, s",
    "ratio": "merge/read",
    "least": "of least",
    "copy": "copy, s",
    "over_copy": "merge/copy",
    "merge_cpu": "merge, CPU s/GB",
    "read_cpu": "read, CPU s/GB",
    "copy_cpu": "copy, CPU s/GB",
    "bytes": "bytes/weights",
    "growth": "growth, MB",
    "foreign": "others' CPU",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merging", description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[256, 1024], help="of weights in a source")
    parser.add_argument("--sources", type=int, default=8)
    parser.add_argument("--stores", nargs="+", default=["file", "file in memory", "S3"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--turns", type=int, default=5, help="of each contestant; medians are printed")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds to wait for a lull, for each row")
    parser.add_argument("--folder", help="for local files (default: that of temporary files)")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("merging.jsonl"), metavar="FILE")
    options = parser.parse_args()
    end_cleanly()
    with _server("S3" in options.stores) as server:
        rows = [
            _row(options, server, store, dtype, megabytes)
            for store in options.stores
            for dtype in options.dtypes
            for megabytes in options.megabytes
        ]
    print_table(rows, COLUMNS)
    write_json_lines(options.json, rows)


@contextlib.contextmanager
def _server(needed: bool) -> Iterator[Any]:
    if not needed:
        yield None
        return
    from tests.support.stores import running, seaweedfs

    with running(seaweedfs()) as server:
        yield server


def _row(options: argparse.Namespace, server: Any, store: str, dtype: str, megabytes: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        job = {"store": store, "dtype": dtype, "megabytes": megabytes, "sources": options.sources}
        job |= {"turns": options.turns, "root": server.new_url() if store == "S3" else folder}
        job["options"] = server.options if store == "S3" else None
        _start(job | {"do": "save"})
        found, foreign = undisturbed(lambda: _start(job | {"do": "measure"}), options.patience)
        growth = _start(job | {"do": "grow"})["growth"]
    row = {key: job[key] for key in ("store", "dtype", "sources", "megabytes")}
    gigabytes = megabytes * options.sources / 1e3
    for name in CONTESTANTS:
        row[name] = statistics.median(found[name])
        row[f"{name}_cpu"] = statistics.median(found[f"{name}_cpu"]) / gigabytes
    row |= {"ratio": row["merge"] / row["read"], "least": min(found["merge"]) / min(found["read"])}
    row["over_copy"] = row["merge"] / row["copy"]
    row |= {"bytes": found["bytes"], "growth": growth / 1e6, "foreign": foreign, "turns": found}
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def _start(job: Mapping[str, Any]) -> dict[str, Any]:
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
    return start_ranks("benchmarks.merging", [json.dumps(job)], prefixes=[[]], environment=threads, timeout=1800)[0]


# The process that is measured.

_Ranges: TypeAlias = Mapping[str, list[tuple[str, int, int]]]  # by the URL of a source: file, start, stop


def work(job: Mapping[str, Any]) -> None:
    steps = {"save": _save, "measure": _measure, "grow": _grow}
    report(steps[job["do"]](job))


def _sources(job: Mapping[str, Any]) -> list[str]:
    return [f"{job['root']}/{number}" for number in range(job["sources"])]


def _save(job: Mapping[str, Any]) -> dict[str, Any]:
    dtype = getattr(torch, job["dtype"])
    numel = EACH // dtype.itemsize
    for number, url in enumerate(_sources(job)):
        count = round(job["megabytes"] * 10**6 / EACH)
        weights = {str(n): torch.randn(numel).view(-1, 1000).to(dtype) for n in range(count)}
        state = {"0": torch.full((numel // 10,), float(number))}
        dist_asgd.save(url, {"model": weights, "optimizer": {"state": state}}, job["options"])
    dist_asgd.save(f"{job['root']}/small", {"model": {"0": torch.ones(3)}}, job["options"])
    return {}


def _measure(job: Mapping[str, Any]) -> dict[str, Any]:
    """Runs the contestants in turns; the first turn does not count."""
    found: dict[str, Any] = {f"{name}{clock}": [] for name in CONTESTANTS for clock in ("", "_cpu")}
    ranges = {url: _ranges(url, job["options"]) for url in _sources(job)}
    size = sum(stop - start for of_source in ranges.values() for _, start, stop in of_source)
    for turn in range(job["turns"] + 1):
        for name, act in CONTESTANTS.items():
            before, out = _bytes_read(), f"out{turn}"
            taken = _timed(job, lambda act=act, out=out: act(job, ranges, out))
            if name == "merge":
                found["bytes"] = None if job["store"] == "S3" else (_bytes_read() - before) / size
            Storage.open(job["root"], job["options"]).remove_tree(out)
            if turn:
                for clock, seconds in zip(("", "_cpu"), taken, strict=True):
                    found[f"{name}{clock}"].append(seconds)
    return found


def _timed(job: Mapping[str, Any], act: Callable[[], object]) -> tuple[float, float]:
    """Returns seconds by the clock, and of the CPU."""
    if job["store"] == "file":
        os.sync()
        for file in Path(job["root"]).rglob("*.distcp"):
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start, cpu = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - start, time.process_time() - cpu


def _ranges(url: str, options: Any) -> list[tuple[str, int, int]]:
    """Returns the ranges of files in which the weights are, each at most 8 MiB."""
    manifest = read_manifest(Storage.open(url, options).read(MANIFEST))
    items = [
        manifest.items[chunk.item]
        for key, tensor in manifest.tensors.items()
        for chunk in tensor.chunks
        if key.startswith("model.")
    ]
    return [
        (item.file, item.start + at, item.start + min(at + READ_BYTES, item.size))
        for item in items
        for at in range(0, item.size, READ_BYTES)
    ]


def _merge(job: Mapping[str, Any], ranges: _Ranges, out: str) -> None:
    dist_asgd.merge(_sources(job), f"{job['root']}/{out}", job["options"])


def _read(job: Mapping[str, Any], ranges: _Ranges, out: str) -> None:
    for _ in _data(job, ranges):
        pass


def _copy(job: Mapping[str, Any], ranges: _Ranges, out: str) -> None:
    last = list(ranges)[-1]
    chunks = (data for url, data in _data(job, ranges) if url == last)
    Storage.open(job["root"], job["options"]).write(f"{out}/copy", chunks)


CONTESTANTS: Mapping[str, Callable[[Mapping[str, Any], _Ranges, str], None]] = {
    "merge": _merge,
    "read": _read,
    "copy": _copy,
}


def _data(job: Mapping[str, Any], ranges: _Ranges) -> Iterator[tuple[str, bytes]]:
    known: list[FileSystems] = []  # one client for all sources, as a merge has
    for url, of_source in ranges.items():
        for _, data in Storage.open(url, job["options"], known=known).read_ranges(of_source):
            yield url, data


def _bytes_read() -> int:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def _grow(job: Mapping[str, Any]) -> dict[str, Any]:
    dist_asgd.merge(f"{job['root']}/small", f"{job['root']}/warm", job["options"])
    start = reset_peak()
    dist_asgd.merge(_sources(job), f"{job['root']}/grown", job["options"])
    return {"growth": peak_resident() - start}


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        work(json.loads(sys.argv[1]))
    else:
        main()
