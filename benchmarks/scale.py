"""What thousands of ranks cost one of them: construction, state_dict() and the plan of a checkpoint, beside the peers.

    python -m benchmarks.scale --worlds 8 64 512 4096

No row needs more than one process, and each has one of its own, with one thread. Memory is the growth of the highest
resident memory (see memory.py) while the function ran, after a small one of the same kind; what was there before, as
the parameters, is not in it, what the function makes and keeps is.

*Optimizers* (``real``): one rank of N on PyTorch's fake process group, of which every collective returns at once. So
these figures hold all that a rank computes and none of what it waits for: no network, and no connections (the
optimizer's group for agreements is gloo's on a real machine and a fake one here). What it gathers is N times its own,
but for the others' coordinates in the mesh.
- plain parameters, averaging off: ours (``gradients="local"``) beside ZeroRedundancyOptimizer, of which only the
  construction is comparable: it has no sharded state dict. Ours moves the parameters into buckets meanwhile.
- parameters as FSDP2 places them, Shard(0) over all ranks: ours beside torch.optim.ASGD after a step. The DTensors are
  made from this rank's block; nothing is wrapped. Models of which a rank would have more than ``--most`` are left out.
Planning is DefaultSavePlanner's for {"optimizer": state_dict()}, what a rank does in dcp.save before it talks to
others; the plan is what it sends to the coordinator. Its keys are all names, which torch's planner sends in each plan.

*Layout* (``layout``): ours, plain parameters that need not exist. plan_buckets, and of one rank the pieces, StatePieces
over a single element that is repeated, and their plan. The chunks of all ranks are those of 16 of them, scaled up.

*Coordinator* (``global``): torch's create_global_plan for the plans of all ranks, and its metadata. Plans of plain
parameters are those of pure layout (tests/optimizer/test_scale.py), those of FSDP2's come from one
optimizer after the other. In this process plans share the keys that each would bring along; so time is all of torch's
work, and memory only that beyond the plans.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.table import print_table, write_json_lines
from tests.support.memory import MIB, map_large_blocks
from tests.support.processes import end_cleanly, report, start_ranks
from tests.support.scale import (
    Row,
    Shape,
    fake_ranks,
    measure_global,
    measure_layout,
    measure_optimizer,
)

PEERS = {"plain": "zero", "fsdp": "asgd"}
SMALL = 4  # parameters of what is run first
REAL_COLUMNS = {
    "layout": "",
    "ranks": "ranks",
    "size": "parameters",
    "construct": "construction, s",
    "peer_construct": "peer's",
    "construct_ratio": "peer's/ours",
    "construct_mib": "MiB",
    "peer_construct_mib": "peer's",
    "plan": "state_dict + plan, s",
    "peer_plan": "peer's",
    "plan_ratio": "peer's/ours",
    "plan_mib": "MiB",
    "peer_plan_mib": "peer's",
    "share_mib": "share of ax, MiB",
    "items": "plan's items",
    "peer_items": "peer's",
    "kib": "their KiB",
    "peer_kib": "peer's",
    "keys_kib": "keys, KiB",
}
LAYOUT_COLUMNS = {
    "ranks": "ranks",
    "size": "parameters",
    "bucket_mib": "bucket, MiB",
    "buckets": "buckets",
    "layout": "layout, s",
    "plan": "pieces + plan, s",
    "mib": "MiB",
    "items": "plan's items",
    "kib": "their KiB",
    "chunks": "chunks, all ranks",
    "metadata_mib": "their MiB",
    "fsdp_chunks": "FSDP2's chunks",
}
GLOBAL_COLUMNS = {
    "ranks": "ranks",
    "size": "parameters",
    "name": "",
    "items": "items of all plans",
    "seconds": "global plan, s",
    "mib": "MiB",
    "metadata_mib": "metadata, MiB",
    "chunks": "chunks",
    "over_ours": "time of ours",
}
HEADINGS = {
    "real": "One rank on the fake process group, fp32. Peers: ZeroRedundancyOptimizer (plain), torch.optim.ASGD (fsdp)",
    "layout": "Plain parameters by pure layout, fp32, one rank",
    "global": "The coordinator's plan, torch's own, for the plans of all ranks",
}
COLUMNS = {"real": REAL_COLUMNS, "layout": LAYOUT_COLUMNS, "global": GLOBAL_COLUMNS}
NAMES = {"plain": "ours, plain", "fsdp": "ours, FSDP2's", "asgd": "torch.optim.ASGD, FSDP2's"}


def main() -> None:
    options = _arguments()
    torch.set_num_threads(1)
    if options.worker is not None:
        report(_worker(*options.worker.split(",")))
        return
    end_cleanly()
    rows: list[Row] = []
    for table in options.tables:
        found = list({"real": _real_rows, "layout": _layout_rows, "global": _global_rows}[table](options))
        print(f"\n{HEADINGS[table]}\n", flush=True)
        print_table(found, COLUMNS[table])
        rows += [{"table": table, **row} for row in found]
    write_json_lines(options.json, rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--tables", nargs="+", default=list(COLUMNS), choices=list(COLUMNS))
    parser.add_argument("--worlds", type=int, nargs="+", default=[8, 64, 512, 4096])
    sizes = ["10000x64x64", "10000x4096x24"]
    parser.add_argument("--plain", nargs="+", default=sizes, metavar="COUNTxSHAPE", help="real, of each rank")
    large = ["10000x8192x1221", "10000x16384x6104"]
    parser.add_argument("--fsdp", nargs="+", default=[sizes[1], *large], metavar="COUNTxSHAPE", help="real")
    parser.add_argument("--layout", nargs="+", default=[*sizes, large[1]], metavar="COUNTxSHAPE", help="layout")
    parser.add_argument("--buckets", type=int, nargs="+", default=[25, 400], metavar="MIB", help="layout")
    parser.add_argument("--most", type=float, default=2**30, metavar="BYTES", help="fsdp: of parameters, on one rank")
    both = ["8:1000x4096x24", "64:1000x4096x24"]
    parser.add_argument("--both", nargs="*", default=both, metavar="RANKS:COUNTxSHAPE", help="global, with the peer")
    ours = ["4096:1000x4096x24", "512:10000x64x64", "4096:10000x64x64"]
    parser.add_argument("--ours", nargs="*", default=ours, metavar="RANKS:COUNTxSHAPE", help="global, ours alone")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("scale.jsonl"), metavar="FILE")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def parse_size(text: str) -> list[Shape]:
    """COUNTxSHAPE: the shapes of all parameters."""
    count, *shape = map(int, text.split("x"))
    return [tuple(shape)] * count


def _run(*arguments: object) -> Row:
    worker = ["--worker", ",".join(map(str, arguments))]
    return start_ranks("benchmarks.scale", worker, prefixes=[[]], environment={}, timeout=1800)[0]


def _worker(table: str, name: str, ranks: str, size: str, *rest: str) -> Row:
    map_large_blocks()
    shapes, world_size = parse_size(size), int(ranks)
    if table == "layout":
        measure_layout(shapes[:SMALL], world_size, int(rest[0]) * MIB)
        return measure_layout(shapes, world_size, int(rest[0]) * MIB)
    if table == "global":
        measure_global(name, shapes[:SMALL], 8)
        return measure_global(name, shapes, world_size)
    with fake_ranks(world_size, rank=world_size // 2):
        measure_optimizer(name, shapes[:SMALL])
        gc.collect()
        return measure_optimizer(name, shapes)


_UNITS = {0: "", 3: " k", 6: " M", 9: " B", 12: " T"}


def _size_text(shapes: Sequence[Shape]) -> str:
    total = sum(map(math.prod, shapes))
    power = max(p for p in _UNITS if total >= 0.95 * 10**p)
    return f"{len(shapes):,} = {total / 10**power:.3g}{_UNITS[power]}"


def _ratio(peer: float | None, ours: float) -> float | None:
    return None if peer is None else round(peer / ours, 2)


# Optimizers on the fake process group


def _real_rows(options: argparse.Namespace) -> Iterator[Row]:
    for layout, sizes in (("plain", options.plain), ("fsdp", options.fsdp)):
        for size in sizes:
            for ranks in options.worlds:
                total = 4 * sum(map(math.prod, parse_size(size)))
                if layout == "plain" or total / ranks <= options.most:
                    yield _real_row(layout, ranks, size, total / ranks)


def _real_row(layout: str, ranks: int, size: str, share: float) -> Row:
    ours, peer = _run("real", layout, ranks, size), _run("real", PEERS[layout], ranks, size)
    return {
        "layout": layout,
        "ranks": ranks,
        "size": _size_text(parse_size(size)),
        "share_mib": round(share / MIB, 1),
        **ours,
        **{f"peer_{key}": value for key, value in peer.items()},
        "construct_ratio": _ratio(peer["construct"], ours["construct"]),
        "plan_ratio": _ratio(peer["plan"], ours["plan"]),
    }


# Pure layout


def _layout_rows(options: argparse.Namespace) -> Iterator[Row]:
    for size in options.layout:
        for mib in options.buckets:
            for ranks in options.worlds:
                row = _run("layout", "ours", ranks, size, mib)
                yield {"ranks": ranks, "size": _size_text(parse_size(size)), "bucket_mib": mib, **row}


# The coordinator


def _global_rows(options: argparse.Namespace) -> Iterator[Row]:
    pairs = [(case, list(NAMES)) for case in options.both] + [(case, ["plain"]) for case in options.ours]
    for case, names in pairs:
        ranks, size = case.split(":")
        rows = {name: _run("global", name, ranks, size) for name in names}
        for name, row in rows.items():
            over = _ratio(row["seconds"], rows["plain"]["seconds"])
            about = {"ranks": int(ranks), "size": _size_text(parse_size(size)), "name": NAMES[name]}
            yield {**about, **row, "over_ours": over}


if __name__ == "__main__":
    main()
