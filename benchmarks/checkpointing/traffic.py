"""Bytes and requests of loads, as the S3 server sees them: any number of ranks, other numbers and kinds of sharding."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Shard
from torch.utils._pytree import tree_leaves

from benchmarks.checkpointing import systems
from dist_asgd import ShardedASGD
from dist_asgd.checkpoint.state.tensor_blocks import to_fill
from tests.support.counting_proxy import Proxy, proxied
from tests.support.processes import free_port, report, start_ranks

WORLDS = (1, 2, 3, 4)
# How the state lies on the ranks that save and on those that load.
KINDS = (("rows", "rows"), ("zero", "zero"), ("replicated", "rows"), ("rows", "replicated"), ("rows", "columns"))
COLUMNS = {"saved": "saved as", "loaded": "loaded as", "ranks": "by ranks"} | {
    f"{system} {world}": f"{system}, by {world}" for system in systems.SYSTEMS for world in WORLDS
}


def measure(server: Any, megabytes: int) -> list[dict[str, Any]]:
    """A row for each load: bytes that the server has sent, and those that the ranks needed."""
    found: list[dict[str, Any]] = []
    with proxied(server.address, server.options, delay=0.0) as (proxy, through):
        places = {
            (system, kind, world): f"{server.new_url()}/{system}"
            for system, kind, world in itertools.product(systems.SYSTEMS, sorted({kind for kind, _ in KINDS}), WORLDS)
        }
        for world in WORLDS:
            saves = [("save", system, kind, url) for (system, kind, by), url in places.items() if by == world]
            _run(world, proxy, through, saves, megabytes)
        for world in WORLDS:
            cases = [(kinds, place) for kinds in KINDS for place in places if place[1] == kinds[0]]
            loads = [("load", place[0], kinds[1], places[place]) for kinds, place in cases]
            for (kinds, place), result in zip(cases, _run(world, proxy, through, loads, megabytes), strict=True):
                case = {"system": place[0], "saved": kinds[0], "loaded": kinds[1], "ranks": place[2], "by": world}
                found.append(case | result | {"ratio": result["sent"] / result["needed"]})
    return found


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Bytes sent over bytes needed; the numbers of ranks that load stand side by side."""
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        case = {key: row[key] for key in ("saved", "loaded", "ranks")}
        lines.setdefault(tuple(case.values()), case)[f"{row['system']} {row['by']}"] = row["ratio"]
    return list(lines.values())


def _run(
    world: int, proxy: Proxy, through: Mapping[str, Any], tasks: Sequence[Any], megabytes: int
) -> list[dict[str, int]]:
    """What each task took, with what all ranks needed."""
    job = {"control": [proxy.port, proxy.control], "options": through, "tasks": tasks, "megabytes": megabytes}
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = start_ranks(__name__, [json.dumps(job)], prefixes=[[]] * world, environment=environment)
    needed = [sum(counts) for counts in zip(*(each["needed"] for each in ranks), strict=True)]
    return [traffic | {"needed": count} for traffic, count in zip(ranks[0]["traffic"], needed, strict=True)]


# A rank.


def work(job: Mapping[str, Any]) -> None:
    systems.begin()
    proxy, passed, needed = Proxy(*job["control"]), [], []
    for what, name, kind, url in job["tasks"]:
        state = make_state(kind, job["megabytes"], filled=what == "save")
        needed.append(sum(block.data.nbytes for tensor in _tensors(state) for block in to_fill("", tensor).blocks))
        systems.barrier()
        before = proxy.traffic()
        systems.barrier()
        getattr(systems.SYSTEMS[name], what)(url, state, job["options"])
        systems.barrier()
        passed.append(vars(proxy.traffic().since(before)))
        if what == "load":
            check(state, make_state(kind, job["megabytes"], filled=True), f"{name} {url} as {kind}")
    report({"traffic": passed, "needed": needed})
    systems.end()


def make_state(kind: str, megabytes: int, filled: bool) -> dict[str, Any]:
    tensors = systems.make_tensors(megabytes)
    if not filled:
        tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    if kind == "zero":
        return {"optimizer": make_optimizer(tensors, steps=3 if filled else 0)}
    if kind == "replicated" or systems.world_size() == 1:
        return {"tensors": tensors}
    return {"tensors": systems.placed(tensors, Shard(0 if kind == "rows" else 1))}


def make_optimizer(tensors: Mapping[str, Tensor], steps: int) -> ShardedASGD:
    """Its averages are flat shards, cut anywhere."""
    params = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items() if tensor.ndim}
    optimizer = ShardedASGD(params.items(), gradients="reduced", lr=0.1, t0=0)
    for _ in range(steps):
        for param in params.values():
            param.grad = param.detach() / 2
        optimizer.step()
    return optimizer


def _tensors(state: Any) -> list[Tensor]:
    parts = [part.state_dict() if isinstance(part, ShardedASGD) else part for part in state.values()]
    return [leaf for leaf in tree_leaves(parts) if isinstance(leaf, Tensor)]


def check(found: Any, expected: Any, what: str) -> None:
    """A load that left anything out would be cheap."""
    for one, other in zip(_tensors(found), _tensors(expected), strict=True):
        pairs = zip(to_fill("", one).blocks, to_fill("", other).blocks, strict=True)
        if not all(torch.equal(block.data, wanted.data) for block, wanted in pairs):
            sys.exit(f"{what}: the load did not give what was saved")


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
