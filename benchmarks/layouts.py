"""Time, state and bytes of a step where parameters are DTensors, ours beside torch.optim.ASGD in the same run.

    python -m benchmarks.layouts --counts 10 100 300 1000 --ranks 2 4

Cost: small parameters under each layout on two ranks of one thread, gradients given as DTensors, averaging on. The
contestants take turns of some steps, so that a disturbance of the machine meets all of them. The first step of a turn
finds the caches as others left them, as a step does after forward and backward; the others find what the last step
used. Time is that of the slower rank; CPU time that of the calling thread, without what it waited for. That all do the
same work is checked: the parameters of ours and of the for-loop are compared bit for bit.

Memory: of a model of residual feed-forward blocks after a few iterations, the bytes of ``ax`` that a rank holds, and
for a check all that can be reached from the optimizer (see memory.py). Of the same optimizers, what ``step()`` hands
to collectives.

Beside: two averages of ShardedAverages beside AdamW (with "zero", beside ShardedASGD): the bytes of averages that a
rank holds before and after they start, and what update() and a swap hand to collectives.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import ASGD, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.quiet import undisturbed
from benchmarks.table import print_table, write_json_lines
from dist_asgd import EMA, ShardedASGD, ShardedAverages, Uniform
from tests.support import contestants
from tests.support.memory import reachable
from tests.support.processes import end_cleanly, free_port, report, start_ranks

TABLES = ("cost", "memory", "beside")
LAYOUTS = ("zero", "ddp", "fsdp", "hsdp", "tp", "fsdp+tp")
COST_LAYOUTS = ("fsdp", "hsdp", "tp")  # those in which every parameter is a DTensor
COST_RANKS = 2
PEERS = ("foreach", "for_loop")
WARMUP = 3  # steps; averaging starts with the second
ROWS = 8  # of the batch
COST_COLUMNS = {
    "layout": "layout",
    "count": "parameters",
    "caches": "caches",
    "ours": "ours, ms",
    "ours_min": "min",
    "foreach": "ASGD(foreach=True), ms",
    "foreach_min": "min",
    "for_loop": "ASGD(foreach=False), ms",
    "for_loop_min": "min",
    "foreach_over_ours": "foreach/ours",
    "foreach_over_ours_min": "of minima",
    "foreach_over_ours_cpu": "of CPU time",
    "for_loop_over_ours": "for-loop/ours",
    "for_loop_over_ours_min": "of minima",
    "for_loop_over_ours_cpu": "of CPU time",
    "ours_each": "ours, us each",
    "foreach_each": "foreach, us each",
    "for_loop_each": "for-loop, us each",
    "others": "others' CPU",
}
MEMORY_COLUMNS = {
    "ranks": "ranks",
    "layout": "layout",
    "share": "4P/N",
    "ours_max": "ours, max",
    "ours_min": "min",
    "ours_ratio": "max/(4P/N)",
    "ours_copies": "copies",
    "ours_reachable": "all reachable",
    "peer_max": "ASGD, max",
    "peer_min": "min",
    "peer_ratio": "max/(4P/N)",
    "peer_copies": "copies",
    "peer_reachable": "all reachable",
    "peer_over_ours": "ASGD/ours",
}
BESIDE_COLUMNS = {
    "ranks": "ranks",
    "layout": "layout",
    "share": "8P/N",
    "held_before": "before start",
    "held_max": "averages, max",
    "held_min": "min",
    "ratio": "max/(8P/N)",
    "update": "collectives of update()",
    "swap_in": "bytes of a swap in",
    "swap_out": "and out",
    "swap_in_ratio": "in, of what the rank has of the parameters",
}
WIRE_COLUMNS = {
    "ranks": "ranks",
    "layout": "layout",
    "calls": "collectives of step()",
    "gathered": "bytes gathered",
    "gathered_ratio": "of what the rank has of the parameters",
    "sent": "sent by a rank",
}


def main() -> None:
    options = _arguments()
    if options.worker is not None:
        _worker(options)
        return
    end_cleanly()
    rows: list[dict[str, Any]] = []
    if "cost" in options.tables:
        rows += _cost_table(options)
    if "memory" in options.tables:
        rows += _memory_tables(options)
    if "beside" in options.tables:
        rows += _beside_table(options)
    write_json_lines(options.json, rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layouts", description=__doc__.splitlines()[0])
    parser.add_argument("--tables", nargs="+", default=TABLES, choices=TABLES)
    parser.add_argument("--layouts", nargs="+", default=COST_LAYOUTS, choices=COST_LAYOUTS, help="cost")
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 100, 300, 1000], help="cost: of parameters")
    parser.add_argument("--side", type=int, default=64, help="cost: of the square parameters")
    parser.add_argument("--turn", type=int, default=5, help="cost: steps of a contestant without others' between them")
    parser.add_argument("--turns", type=int, default=10, help="cost: timed ones of each contestant per round")
    parser.add_argument("--rounds", type=int, default=2, help="cost: fresh processes each time")
    patience = "cost: seconds to wait, before each round of each row, for other processes to be quiet"
    parser.add_argument("--patience", type=float, default=0.0, help=patience)
    parser.add_argument("--parameters", type=float, default=8e6, help="memory, beside: of the model")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="memory, beside: even numbers")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("layouts.jsonl"), metavar="FILE")
    parser.add_argument("--worker", choices=TABLES, help=argparse.SUPPRESS)
    parser.add_argument("--layout", choices=LAYOUTS, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def _run(ranks: int, worker: str, layout: str, *arguments: str) -> list[dict[str, Any]]:
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    command = ["--worker", worker, "--layout", layout, *arguments]
    return start_ranks("benchmarks.layouts", command, prefixes=[[]] * ranks, environment=environment)


def _worker(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if options.worker == "cost":
        report(_timed(options))
    elif options.worker == "beside":
        report(_measured_beside(options.layout, options.parameters))
    else:
        report({name: _measured(options.layout, name, options.parameters) for name in ("ours", "peer")})
    dist.barrier()
    dist.destroy_process_group()


# Layouts


def mesh_of(layout: str) -> DeviceMesh:
    """HSDP has two replicas, FSDP2 + TP cuts weights in two."""
    size = dist.get_world_size()
    if layout == "hsdp":
        return init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    if layout == "fsdp+tp":
        return init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
    return init_device_mesh("cpu", (size,), mesh_dim_names=("tp" if layout == "tp" else "dp",))


def place(model: nn.Sequential, layout: str, mesh: DeviceMesh) -> None:
    """Turns the parameters of contestants.Block into DTensors, where ``layout`` has such."""
    if layout in ("tp", "fsdp+tp"):
        for block in model:
            parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if layout in ("fsdp", "hsdp", "fsdp+tp"):
        data = mesh["dp"] if layout == "fsdp+tp" else mesh
        for module in [*model, model]:
            fully_shard(module, mesh=data)


def ours(model: nn.Module, layout: str) -> ShardedASGD:
    fsdp = layout in ("fsdp", "hsdp", "fsdp+tp")
    gradients = "reduced" if layout in ("ddp", "tp", "fsdp+tp") else "local"
    return ShardedASGD(
        model.named_parameters(), lr=contestants.LR, t0=0, gradients=gradients, module=model if fsdp else None
    )


def data_rank(layout: str) -> int:
    """Which batch this rank trains on: the same for ranks that share the work on one."""
    return {"tp": 0, "fsdp+tp": dist.get_rank() // 2}.get(layout, dist.get_rank())


def local(tensor: Tensor) -> Tensor:
    """What this rank really has of a tensor, or of a piece in a state dict of ours."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else getattr(tensor, "local", tensor)


def local_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(part.numel() * part.element_size() for part in map(local, tensors))


# Cost


class Many(nn.Module):
    """Square parameters, nothing else; the same values on every rank and each time."""

    def __init__(self, count: int, side: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(torch.randn(side, side, generator=generator) for _ in range(count))


def _make_many(count: int, side: int, layout: str, mesh: DeviceMesh) -> Many:
    """Under ``layout``, with gradients, which every step uses again: equal on all ranks, as those of replicas must."""
    model = Many(count, side)
    if layout == "tp":
        for index, whole in enumerate(model.weights):
            model.weights[index] = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)]))
    else:
        fully_shard(model, mesh=mesh)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        grad = torch.randn(p.to_local().shape, generator=generator)
        shape, stride = p.shape, p.stride()
        p.grad = DTensor.from_local(grad, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)
    return model


def _timed(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """One rank: the seconds of each timed step of each contestant, of the clock and of this thread's CPU time."""
    mesh = mesh_of(options.layout)
    models = {name: _make_many(options.count, options.side, options.layout, mesh) for name in ("ours", *PEERS)}
    optimizers: dict[str, Optimizer] = {"ours": ours(models["ours"], options.layout)}
    for name in PEERS:
        params = models[name].parameters()
        optimizers[name] = ASGD(params, lr=contestants.LR, t0=0, foreach=name == "foreach")
    for optimizer in optimizers.values():
        for _ in range(WARMUP):
            optimizer.step()
    seconds: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in optimizers}
    for _ in range(options.turns):
        for name, optimizer in optimizers.items():
            dist.barrier()
            for _ in range(options.turn):
                wall, cpu = time.perf_counter(), time.thread_time()
                optimizer.step()
                seconds[name]["cpu"].append(time.thread_time() - cpu)
                seconds[name]["wall"].append(time.perf_counter() - wall)
    _require_same_work(models, optimizers)
    return seconds


def _require_same_work(models: dict[str, Many], optimizers: dict[str, Optimizer]) -> None:
    """Ours and the for-loop agree in every bit; foreach rounds elsewhere, by an ulp or so a step."""
    state = {name: list(optimizer.state_dict()["state"].values()) for name, optimizer in optimizers.items()}
    if not all(float(entry["mu"]) < 1 for entries in state.values() for entry in entries):
        raise RuntimeError("a contestant does not average")
    for name in PEERS:
        for mine, other in zip(models["ours"].parameters(), models[name].parameters(), strict=True):
            tolerance = 0.0 if name == "for_loop" else 1e-4
            torch.testing.assert_close(local(mine), local(other), rtol=tolerance, atol=tolerance)


def _cost_table(options: argparse.Namespace) -> list[dict[str, Any]]:
    cases = [(layout, count) for layout in options.layouts for count in options.counts]
    rounds: dict[tuple[str, int], list[tuple[Any, float]]] = {case: [] for case in cases}
    numbers = [f"--{key}={getattr(options, key)}" for key in ("side", "turn", "turns")]
    for _ in range(options.rounds):
        for layout, count in cases:
            run = partial(_run, COST_RANKS, "cost", layout, f"--count={count}", *numbers)
            rounds[layout, count].append(undisturbed(run, options.patience))
    rows = []
    for (layout, count), found in rounds.items():
        others = round(max(share for _, share in found), 2)
        for caches, first in (("others'", True), ("own", False)):
            row: dict[str, Any] = {"table": "cost", "layout": layout, "count": count, "caches": caches}
            rows.append(row | _times([ranks for ranks, _ in found], options.turn, first, count) | {"others": others})
    steps = options.turns * options.rounds
    print(
        f"\nCost of step(): fp32 parameters of {options.side} x {options.side}, averaging on, {COST_RANKS} ranks of 1 "
        f"thread, median of {steps} steps after others' and of {steps * (options.turn - 1)} after its own\n"
    )
    print_table(rows, COST_COLUMNS)
    return rows


def _times(rounds: Sequence[Any], turn: int, first: bool, count: int) -> dict[str, Any]:
    """Figures of the first steps of the turns, or of the others; ``rounds[i][rank][name][clock]`` are seconds."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for name in ("ours", *PEERS):
        for clock in ("wall", "cpu"):
            slower = [list(map(max, zip(*(rank[name][clock] for rank in ranks), strict=True))) for ranks in rounds]
            seconds[name, clock] = [s for steps in slower for i, s in enumerate(steps) if (i % turn == 0) == first]
    middle = {key: statistics.median(taken) for key, taken in seconds.items()}
    row: dict[str, Any] = {}
    for name in ("ours", *PEERS):
        wall = seconds[name, "wall"]
        row |= {name: round(1e3 * middle[name, "wall"], 2), f"{name}_min": round(1e3 * min(wall), 2)}
        row |= {f"{name}_each": round(1e6 * middle[name, "wall"] / count, 1), f"{name}_seconds": wall}
    for name in PEERS:
        row[f"{name}_over_ours"] = round(middle[name, "wall"] / middle["ours", "wall"], 1)
        row[f"{name}_over_ours_min"] = round(min(seconds[name, "wall"]) / min(seconds["ours", "wall"]), 1)
        row[f"{name}_over_ours_cpu"] = round(middle[name, "cpu"] / middle["ours", "cpu"], 1)
    return row


# Memory, and bytes handed to collectives


class Handed(TorchDispatchMode):
    """The collective calls in its block: of each the operator, and the bytes of its largest and smallest tensor.

    It sees calls on plain tensors only: what DTensor's operators do inside is hidden.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
            if sizes:
                self.calls.append((func._schema.name.split("::")[1].strip("_"), max(sizes), min(sizes)))
        return func(*args, **(kwargs or {}))


def _measured(layout: str, name: str, parameters: float) -> dict[str, Any]:
    """One rank, one of ours and its peer: after a few iterations, the bytes that it holds; and the calls of a step."""
    model = contestants.make_model(parameters)
    total = contestants.parameter_bytes(model)
    mesh = mesh_of(layout)
    place(model, layout, mesh)
    replicated = layout == "ddp" or (layout == "zero" and name == "peer")
    called = DistributedDataParallel(model) if replicated else model
    optimizer = ours(model, layout) if name == "ours" else ASGD(model.parameters(), lr=contestants.LR, t0=0)
    batch = contestants.make_batch(data_rank(layout), rows=ROWS)
    for _ in range(WARMUP):
        contestants.iterate(called, optimizer, batch)
    contestants.backward(called, batch)
    with Handed() as handed:
        optimizer.step()
    optimizer.zero_grad()
    entries = optimizer.state_dict()["state"].values()
    if not all(float(entry["mu"]) < 1 for entry in entries):
        raise RuntimeError(f"{name} does not average under {layout}")
    return {
        "total": total,
        "parameters": local_bytes(model.parameters()),
        "held": local_bytes(entry["ax"] for entry in entries),
        "reachable": reachable(optimizer, model),
        "calls": handed.calls,
    }


def _memory_tables(options: argparse.Namespace) -> list[dict[str, Any]]:
    memory, wire = [], []
    for ranks in options.ranks:
        for layout in LAYOUTS:
            results = _run(ranks, "memory", layout, f"--parameters={options.parameters}")
            memory.append(_memory_row(layout, results))
            wire.append(_wire_row(layout, [result["ours"] for result in results]))
    print(f"\nMemory: {memory[0]['total'] // 4} fp32 parameters (P), averaging on, bytes of ax on a rank\n")
    print_table(memory, MEMORY_COLUMNS)
    print("\nWire: what step() of ours hands to collectives, the rank with most of it\n")
    print_table(wire, WIRE_COLUMNS)
    return memory + wire


def _memory_row(layout: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    total, ranks = results[0]["ours"]["total"], len(results)
    row: dict[str, Any] = {"table": "memory", "ranks": ranks, "layout": layout, "total": total, "share": total // ranks}
    for name in ("ours", "peer"):
        held = [result[name]["held"] for result in results]
        row |= {f"{name}_max": max(held), f"{name}_min": min(held), f"{name}_held": held}
        row[f"{name}_ratio"] = round(max(held) * ranks / total, 3)
        row[f"{name}_copies"] = round(sum(held) / total, 3)  # 1: no element is on two ranks
        row[f"{name}_reachable"] = max(result[name]["reachable"] for result in results)
    return row | {"peer_over_ours": round(row["peer_max"] / row["ours_max"], 2)}


def _wire_row(layout: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """In an all-gather each rank receives, and on average sends, what is not its own of the result."""

    def gathers(result: dict[str, Any]) -> list[tuple[int, int]]:
        return [(whole, own) for name, whole, own in result["calls"] if "gather" in name]

    most = max(results, key=lambda result: sum(whole for whole, _ in gathers(result)))
    gathered = sum(whole for whole, _ in gathers(most))
    number = Counter((name, size) for name, size, _ in most["calls"])
    return {
        "table": "wire",
        "ranks": len(results),
        "layout": layout,
        "calls": ", ".join(f"{count} {name} of {size}" for (name, size), count in number.items()) or "none",
        "gathered": gathered,
        "gathered_ratio": round(gathered / most["parameters"], 4),
        "sent": sum(whole - own for whole, own in gathers(most)),
        "parameter_bytes": most["parameters"],
    }


# Averages beside another optimizer


def _measured_beside(layout: str, parameters: float) -> dict[str, Any]:
    """One rank: the bytes of two averages before and after they start, and the calls of an update and of a swap."""
    model = contestants.make_model(parameters)
    total = contestants.parameter_bytes(model)
    place(model, layout, mesh_of(layout))
    called = DistributedDataParallel(model) if layout == "ddp" else model
    if layout == "zero":
        optimizer: Optimizer = ours(model, layout)
    else:
        optimizer = AdamW(model.parameters(), lr=contestants.LR, foreach="tp" not in layout)
    averages = ShardedAverages(model.named_parameters(), {"ema": EMA(0.9), "mean": Uniform()}, start=1, module=model)
    batch, held = contestants.make_batch(data_rank(layout), rows=ROWS), []
    before = reachable([averages, optimizer], model) - reachable(optimizer, model)
    for _ in range(WARMUP):
        contestants.iterate(called, optimizer, batch)
        with Handed() as update:
            averages.update()
        held.append(reachable([averages, optimizer], model) - reachable(optimizer, model))
    with Handed() as swap_in:
        swap = averages.averaged_parameters()
        swap.__enter__()
    with Handed() as swap_out:
        swap.__exit__(None, None, None)
    own = {"total": total, "parameters": local_bytes(model.parameters()), "before": before, "held": held}
    return own | {"update": update.calls, "in": swap_in.calls, "out": swap_out.calls}


def _beside_table(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for ranks in options.ranks:
        for layout in LAYOUTS:
            results = _run(ranks, "beside", layout, f"--parameters={options.parameters}")
            rows.append(_beside_row(layout, results))
    print(f"\nBeside: {rows[0]['total'] // 4} fp32 parameters (P), two averages of ShardedAverages; bytes on a rank\n")
    print_table(rows, BESIDE_COLUMNS)
    return rows


def _beside_row(layout: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    total, ranks = results[0]["total"], len(results)
    held = [result["held"][-1] for result in results]
    row: dict[str, Any] = {"table": "beside", "ranks": ranks, "layout": layout, "total": total}
    row |= {"share": 2 * total // ranks, "held_max": max(held), "held_min": min(held)}
    row["held_before"] = max(max(result["before"], result["held"][0]) for result in results)  # before, and after start
    row["ratio"] = round(max(held) / row["share"], 3)
    row["update"] = max(len(result["update"]) for result in results)
    for key, phase in (("swap_in", "in"), ("swap_out", "out")):
        row[key] = max(sum(most for _, most, _ in result[phase]) for result in results)
    row["swap_in_ratio"] = round(row["swap_in"] / max(result["parameters"] for result in results), 4)
    return row


if __name__ == "__main__":
    main()
