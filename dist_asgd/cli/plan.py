"""``dist-asgd plan``: reports how replicated parameters are cut over ranks, and the memory of the optimizer's state."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

from dist_asgd.cli.arguments import add_json_argument, positive
from dist_asgd.cli.output import format_bytes, table, write
from dist_asgd.sharding.layout import plan_buckets

HELP = "how replicated parameters are cut over ranks, and what memory that takes"

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
BUCKET_BYTES = 25 * 2**20  # the default of ShardedASGD


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the parameters' shapes and dtype, the number of ranks, and the size of buckets."""
    parser.description = parser.epilog = None  # the other commands' statuses 1 and 3 are about checkpoints
    parser.add_argument(
        "shapes", nargs="+", type=_shape, metavar="SHAPE", help="of a parameter, as 1000x1000; in order"
    )
    parser.add_argument("--world-size", required=True, type=positive, metavar="N", help="number of ranks")
    parser.add_argument("--dtype", default="float32", choices=ITEM_BYTES, help="of parameters (default: float32)")
    parser.add_argument("--bucket-bytes", default=BUCKET_BYTES, type=positive, metavar="N", help="default: 25 MiB")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the buckets and the bytes of optimizer state per rank. Returns 0."""
    report = _report(arguments.shapes, arguments.world_size, arguments.dtype, arguments.bucket_bytes)
    write(report if arguments.json else _report_text(report))
    return 0


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    shape = tuple(int(size) if size.isascii() and size.isdecimal() else 0 for size in sizes)
    if min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape: write positive sizes joined by x, as 1000x1000 or 10")
    return shape


def _report(shapes: Sequence[tuple[int, ...]], world_size: int, dtype: str, bucket_bytes: int) -> dict[str, Any]:
    """Returns what ``--json`` prints; the parameters are in the order of ``shapes``."""
    numels = [math.prod(shape) for shape in shapes]
    itemsize = ITEM_BYTES[dtype]
    layouts = plan_buckets(numels, world_size=world_size, max_numel=bucket_bytes // itemsize)
    buckets = []
    for layout in layouts:
        elements = sum(span.numel for span in layout.spans)
        buckets.append(
            {
                "parameters": len(layout.spans),
                "elements": elements,
                "padding": layout.numel - elements,
                "elements_per_rank": layout.shard_numel,
            }
        )
    per_rank = sum(layout.shard_numel for layout in layouts)
    masters = 4 * per_rank if itemsize < 4 else 0
    # From the first step on, torch has ax in the parameter's dtype, and step, eta and mu as an fp32 tensor each.
    torch_asgd = sum(numels) * itemsize + 3 * 4 * len(numels)
    return {
        "world_size": world_size,
        "dtype": dtype,
        "buckets": buckets,
        "bytes_per_rank": {
            "before_averaging": masters,
            "averaging": masters + max(itemsize, 4) * per_rank,
            "of_which_masters": masters,
            "torch_asgd": torch_asgd,
        },
    }


def _report_text(report: dict[str, Any]) -> str:
    columns = ("parameters", "elements", "padding", "elements_per_rank")
    buckets = report["buckets"]
    rows = [[str(index), *(f"{bucket[name]:,}" for name in columns)] for index, bucket in enumerate(buckets)]
    rows.append(["total", *(f"{sum(bucket[name] for bucket in buckets):,}" for name in columns)])
    sizes = report["bytes_per_rank"]
    masters = f" ({format_bytes(sizes['of_which_masters'])} of it fp32 masters)" if sizes["of_which_masters"] else ""
    memory = [
        ["ShardedASGD before averaging", format_bytes(sizes["before_averaging"])],
        ["ShardedASGD once averaging", format_bytes(sizes["averaging"]) + masters],
        ["torch.optim.ASGD", format_bytes(sizes["torch_asgd"])],
    ]
    heading = f"{report['dtype']} parameters over {report['world_size']} rank{'s' if report['world_size'] > 1 else ''}"
    lines = [table([["bucket", *(name.replace("_", " ") for name in columns)], *rows])]
    lines += ["", "optimizer state per rank", *(f"  {name:<30}{size}" for name, size in memory)]
    return "\n".join([heading, "", *lines])
