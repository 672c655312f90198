"""Time of saves and loads, contestants in turns; on S3 as it is here, and with a delay of every request."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fsspec
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from benchmarks.checkpointing import systems
from dist_asgd import Checkpointer
from dist_asgd.boxes import Box
from dist_asgd.checkpoint.format.entries import SavedTensor
from dist_asgd.checkpoint.format.tensor_bytes import memory_of
from dist_asgd.checkpoint.saving.commit import CommitRecord, commit
from dist_asgd.checkpoint.saving.writer import BlockToWrite, write_blocks
from dist_asgd.checkpoint.state.tensor_blocks import to_save
from dist_asgd.checkpoint.storage.storage import Storage
from tests.support.counting_proxy import proxied
from tests.support.processes import free_port, report, start_ranks

DELAY = 0.04  # seconds
FILES = 600
COLUMNS = {"case": "", "ranks": "ranks", "ours": "ours, s", "least": "least", "DCP": "DCP, s", "DCP least": "least"}
COLUMNS |= {"ours/DCP": "ours/DCP", "raw": "write + fsync, s", "raw least": "least", "ours/raw": "ours/raw"}
LATENCY = {"case": "", "ranks": "ranks", "ours": "ours, s", "most": "most", "first": "first", "DCP": "DCP, s"}
LATENCY |= {"ratio": "ours/DCP"}
STALLS = {"case": "", "first": "first, ms", "median": "later ones, median ms", "of clone": "of a clone's"}


def measure_time(server: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians of turns."""
    rows = []
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            for what, names in (("save", ["ours", "DCP", "raw"]), ("load", ["ours", "DCP"])):
                job = {"root": f"{folder}/{what}", "options": None, "what": what, "names": names}
                rows.append(_row(f"{what}, file", ranks, job, options))
        for what in ("save", "load"):
            job = {"root": server.new_url(), "options": server.options, "what": what, "names": ["ours", "DCP"]}
            rows.append(_row(f"{what}, S3", ranks, job, options))
    return rows


def measure_latency(server: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """With ``DELAY`` for each request: a load of many files, and saves of next to nothing."""
    rows = []
    with proxied(server.address, server.options, DELAY) as (_proxy, through):
        root = server.new_url()
        many = {"root": root, "options": through, "what": "many", "direct": server.options}
        rows.append(_latency(f"load of {FILES} files", 1, many, options))
        for ranks in (1, 4):
            job = {"root": server.new_url(), "options": through}
            rows.append(_latency("save of 4 KB", ranks, job | {"what": "save small", "keep_last": None}, options))
            rows.append(_latency("load of 4 KB", ranks, job | {"what": "load small"}, options))
            job = {"root": server.new_url(), "options": through, "what": "save small", "keep_last": 2}
            rows.append(_latency("save of 4 KB, keep_last=2", ranks, job, options))
    return [row | {"ratio": row["ours"] / row["DCP"]} for row in rows]


def measure_async(options: argparse.Namespace) -> list[dict[str, Any]]:
    """How long a training loop waits for a save in the background."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        job = {"root": folder, "what": "async", "options": None}
        seconds = _start(1, job, options)[0]
    clone = statistics.median(seconds["clone"][1:])
    return [
        {
            "case": name,
            "first": 1e3 * times[0],
            "median": 1e3 * statistics.median(times[1:]),
            "of clone": statistics.median(times[1:]) / clone,
            "seconds": times,
        }
        for name, times in seconds.items()
    ]


def _start(ranks: int, job: Mapping[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    job = {"turns": options.turns, "megabytes": options.megabytes} | job
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    return start_ranks(__name__, [json.dumps(job)], prefixes=[[]] * ranks, environment=environment, timeout=1800)


def _row(case: str, ranks: int, job: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    seconds = _start(ranks, job, options)[0]
    row: dict[str, Any] = {"case": case, "ranks": ranks, "seconds": seconds}
    for name, key in (("ours", "least"), ("DCP", "DCP least"), ("raw", "raw least")):
        row |= {name: statistics.median(seconds[name]) if name in seconds else None}
        row |= {key: min(seconds[name]) if name in seconds else None}
    for peer in ("DCP", "raw"):
        row[f"ours/{peer}"] = row["ours"] / row[peer] if row[peer] else None
    return row


def _latency(case: str, ranks: int, job: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    seconds = _start(ranks, job, options)[0]
    later = seconds["ours"][1:]
    row = {"case": case, "ranks": ranks, "ours": statistics.median(later), "most": max(later)}
    return row | {"first": seconds["ours"][0], "DCP": statistics.median(seconds["DCP"][-3:]), "seconds": seconds}


# A rank.


def work(job: Mapping[str, Any]) -> None:
    systems.begin()
    works = {"async": stalls, "many": load_many, "save small": save_small, "load small": load_small}
    report(works.get(job["what"], take_turns)(job))
    systems.end()


def timed(act: Callable[[], object]) -> float:
    """Seconds until the last rank has done it."""
    systems.barrier()
    start = time.perf_counter()
    act()
    systems.barrier()
    return time.perf_counter() - start


def take_turns(job: Mapping[str, Any]) -> dict[str, list[float]]:
    """Saves go to a new directory each, which is then removed; a load fills what is there."""
    state = {"tensors": systems.by_rows(systems.make_tensors(job["megabytes"]))}
    contestants = {**systems.SYSTEMS, "raw": Raw()}
    if job["what"] == "load":
        for name in job["names"]:
            contestants[name].save(f"{job['root']}/{name}", state, job["options"])
    seconds: dict[str, list[float]] = {name: [] for name in job["names"]}
    for turn in range(job["turns"] + 1):  # the first is not counted
        for name in sorted(job["names"], reverse=bool(turn % 2)):
            url = f"{job['root']}/{name}" if job["what"] == "load" else f"{job['root']}/{turn}-{name}"
            act = getattr(contestants[name], job["what"])
            settle()
            taken = timed(lambda: act(url, state, job["options"]))  # noqa: B023
            if turn:
                seconds[name].append(taken)
            if job["what"] == "save" and systems.rank() == 0:
                fs, path = fsspec.core.url_to_fs(url, **job["options"] or {})
                fs.rm(path, recursive=True)
    return seconds


def settle() -> None:
    """What earlier turns have written is on the disk, and not written while the next one is timed."""
    systems.barrier()
    if systems.rank() == 0:
        os.sync()
        time.sleep(0.2)


class Raw:
    """One file for each rank with the same bytes, and fsync: what no save can do without."""

    def save(self, url: str, state: systems.State, options: systems.Options) -> None:
        os.makedirs(url, exist_ok=True)
        with open(f"{url}/{systems.rank()}", "xb", buffering=0) as file:
            for tensor in state["tensors"].values():
                for block in to_save("", tensor).blocks:
                    for piece in memory_of(block.data):
                        file.write(piece)
            os.fsync(file)

    def load(self, url: str, state: systems.State, options: systems.Options) -> None:
        raise NotImplementedError


def load_many(job: Mapping[str, Any]) -> dict[str, list[float]]:
    """A checkpoint as ``FILES`` ranks save it, each a row of one tensor; DCP reads the same directory."""
    storage, rows = Storage.open(job["root"], job["direct"]), torch.randn(FILES, 1024)
    written = []
    for rank, row in enumerate(rows.split(1)):
        part = BlockToWrite("tensors.rows", Box((rank, 0), (1, 1024)), [row], is_whole=False)
        written.append(write_blocks(storage, "", rank, [part], {}, lambda: None))
    tensors = {"tensors.rows": (SavedTensor((FILES, 1024), torch.float32), ("tensors", "rows"), None)}
    commit(storage, "", CommitRecord(0, tensors, {}), written)
    seconds: dict[str, list[float]] = {"ours": [], "DCP": []}
    for name in ["ours"] * 6 + ["DCP"]:
        found = {"tensors": {"rows": torch.zeros(FILES, 1024)}}
        seconds[name].append(timed(lambda: systems.SYSTEMS[name].load(job["root"], found, job["options"])))  # noqa: B023
        if not torch.equal(found["tensors"]["rows"], rows):
            sys.exit(f"{name} did not load what was saved")
    return seconds


def small_state() -> dict[str, Any]:
    return {"tensors": systems.by_rows({"weight": torch.ones(32, 32)})}


def save_small(job: Mapping[str, Any]) -> dict[str, list[float]]:
    """As a training run saves: by one Checkpointer; the first time it has to connect."""
    state, seconds = small_state(), {"ours": [], "DCP": []}
    with Checkpointer(job["root"], job["options"], keep_last=job["keep_last"]) as checkpointer:
        for step in range(job["turns"] + 1):
            seconds["ours"].append(timed(lambda: checkpointer.save(step, state)))  # noqa: B023
            url = f"{job['root']}-dcp/{step}"
            seconds["DCP"].append(timed(lambda: systems.SYSTEMS["DCP"].save(url, state, job["options"])))  # noqa: B023
    return seconds


def load_small(job: Mapping[str, Any]) -> dict[str, list[float]]:
    """What ``save_small`` has saved."""
    state, seconds = small_state(), {"ours": [], "DCP": []}
    with Checkpointer(job["root"], job["options"]) as checkpointer:
        for step in range(job["turns"] + 1):
            seconds["ours"].append(timed(lambda: checkpointer.load(state)))
            url = f"{job['root']}-dcp/{step}"
            seconds["DCP"].append(timed(lambda: systems.SYSTEMS["DCP"].load(url, state, job["options"])))  # noqa: B023
    return seconds


def stalls(job: Mapping[str, Any]) -> dict[str, list[float]]:
    """Each waits for what it has begun before the next one's turn, and is not timed then."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # async_save asks for one
    tensors = systems.make_tensors(job["megabytes"])
    state = {"tensors": tensors}
    seconds: dict[str, list[float]] = {"clone": [], "ours, save(wait=False)": [], "DCP, async_save": []}
    copies: list[Tensor] = []
    with Checkpointer(f"{job['root']}/ours", keep_last=1) as checkpointer:
        for turn in range(job["turns"] + 1):
            settle()
            seconds["clone"].append(timed(lambda: copies.extend(tensor.clone() for tensor in tensors.values())))
            copies.clear()
            seconds["ours, save(wait=False)"].append(timed(lambda: checkpointer.save(turn, state, wait=False)))  # noqa: B023
            checkpointer.wait()
            settle()
            folder, futures = Path(job["root"]) / f"dcp-{turn}", []
            writer = dcp.FileSystemWriter(folder)
            seconds["DCP, async_save"].append(
                timed(lambda: futures.append(dcp.async_save(state, storage_writer=writer)))  # noqa: B023
            )
            futures[0].result()
            shutil.rmtree(folder)
    return seconds


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
