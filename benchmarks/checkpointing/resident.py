"""Memory that saves and loads take beyond the state: the peak of a fresh process, kept by the kernel."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from benchmarks.checkpointing import systems
from dist_asgd import EMA, Checkpointer, ShardedAverages
from tests.support.layouts import local
from tests.support.memory import peak_resident, reset_peak
from tests.support.processes import free_port, report, start_ranks
from tests.support.stock_checkpoints import FsspecWriter

COLUMNS = {"what": "", "ranks": "ranks", "store": "store", "tensors": "tensors", "ours": "ours, MB", "DCP": "DCP, MB"}
KINDS = ("save", "load", "async save")


def measure(server: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The highest of the repetitions: growth of resident memory, without the one staged copy of an async save."""
    rows = []
    for (each, count), store in itertools.product(((400, 1), (1600, 1), (8, 50)), ("file", "S3")):
        for what in KINDS:
            row: dict[str, Any] = {"what": what, "ranks": 1, "store": store, "tensors": f"{count} x {each} MB"}
            for name in systems.SYSTEMS:
                peaks = [_peak(server, options, name, what, store, each, count) for _ in range(options.repeat)]
                row |= {name: max(peaks) / 1e6, f"{name} all": peaks}
            print(json.dumps(row), file=sys.stderr, flush=True)
            rows.append(row)
    return rows + measure_averages(server, options)


def measure_averages(server: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The same of ``ShardedAverages`` on two ranks: the rank with most, without the one staged copy of its share."""
    rows = []
    for store, what in itertools.product(("file", "S3"), ("averages, save", "averages, async save")):
        peaks = [_peak(server, options, "ours", what, store, 8, 50, ranks=2) for _ in range(options.repeat)]
        row = {"what": what, "ranks": 2, "store": store, "tensors": "50 x 8 MB", "ours": max(peaks) / 1e6}
        row |= {"ours all": peaks, "DCP": None}
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def _peak(
    server: Any, options: argparse.Namespace, name: str, what: str, store: str, each: int, count: int, ranks: int = 1
) -> int:
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root = folder if store == "file" else server.new_url()
        job = {"name": name, "what": what, "root": root, "each": each, "count": count}
        job["options"] = server.options if store == "S3" else None
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
        found = start_ranks(__name__, [json.dumps(job)], prefixes=[[]] * ranks, environment=environment, timeout=1800)
        return max(int(of_rank["peak"]) for of_rank in found)


# A rank.


def work(job: Mapping[str, Any]) -> None:
    systems.begin()
    if job["what"].startswith("averages"):
        report({"peak": averages(job)})
        systems.end()
        return
    act = {"save": save, "load": load, "async save": save_async}[job["what"]]
    act(job, "small", systems.make_tensors(1, each=1))  # imports, connects, starts its threads
    tensors = systems.make_tensors(job["count"] * job["each"], job["each"])
    report({"peak": act(job, "large", tensors)})


def growth(act: Callable[[], object]) -> int:
    """Bytes."""
    start = reset_peak()
    act()
    return peak_resident() - start


def save(job: Mapping[str, Any], name: str, tensors: Mapping[str, Any]) -> int:
    system, url = systems.SYSTEMS[job["name"]], f"{job['root']}/{name}"
    return growth(lambda: system.save(url, {"tensors": tensors}, job["options"]))


def averages(job: Mapping[str, Any]) -> int:
    """Of a save of one average: in the background, without the copy of this rank's share."""
    grown, share = 0, 0
    for number, megabytes in enumerate((8, job["count"] * job["each"])):  # the small one imports, connects, ...
        tensors = systems.make_tensors(megabytes, job["each"])
        params = [(name, torch.nn.Parameter(tensor)) for name, tensor in tensors.items()]
        kept = ShardedAverages(params, EMA(0.9))
        kept.update()
        share = sum(local(value).nbytes for value in kept.state_dict()["average"].values())
        systems.barrier()
        with Checkpointer(f"{job['root']}/{number}", job["options"]) as checkpointer:
            start = reset_peak()
            checkpointer.save(1, {"averages": kept}, wait="async" not in job["what"])
            checkpointer.wait()
            grown = peak_resident() - start
    return grown - (share if "async" in job["what"] else 0)


def load(job: Mapping[str, Any], name: str, tensors: Mapping[str, Any]) -> int:
    system, url = systems.SYSTEMS[job["name"]], f"{job['root']}/{name}"
    system.save(url, {"tensors": tensors}, job["options"])
    found = {key: torch.ones_like(tensor) for key, tensor in tensors.items()}
    taken = growth(lambda: system.load(url, {"tensors": found}, job["options"]))
    if not all(torch.equal(found[key], tensor) for key, tensor in tensors.items()):
        sys.exit("the load did not give what was saved")
    return taken


def save_async(job: Mapping[str, Any], name: str, tensors: Mapping[str, Any]) -> int:
    act = _save_async_ours if job["name"] == "ours" else _save_async_dcp
    taken = growth(lambda: act(f"{job['root']}/{name}", {"tensors": tensors}, job["options"]))
    return taken - sum(tensor.nbytes for tensor in tensors.values())


def _save_async_ours(url: str, state: Mapping[str, Any], options: Mapping[str, Any] | None) -> None:
    with Checkpointer(url, options) as checkpointer:
        checkpointer.save(1, state, wait=False)
        checkpointer.wait()


def _save_async_dcp(url: str, state: Mapping[str, Any], options: Mapping[str, Any] | None) -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    writer = dcp.FileSystemWriter(url) if options is None else FsspecWriter(url, **options)
    dcp.async_save(dict(state), storage_writer=writer).result()


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
