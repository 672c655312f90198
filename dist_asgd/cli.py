"""The ``dist-asgd`` command."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from dist_asgd import __version__
from dist_asgd.layout import plan_buckets

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
BUCKET_BYTES = 25 * 2**20  # as ShardedASGD's


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit status; wrong arguments exit with 2, as argparse does."""
    arguments = _parser().parse_args(argv)
    status: int = arguments.run(arguments)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dist-asgd", description="Sharded averaged SGD for torch.distributed.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    plan = commands.add_parser("plan", help="how replicated parameters are cut over ranks, and what memory that takes")
    plan.add_argument("shapes", nargs="+", type=_shape, metavar="SHAPE", help="of a parameter, as 1000x1000; in order")
    plan.add_argument("--world-size", required=True, type=_positive, metavar="N", help="number of ranks")
    plan.add_argument("--dtype", default="float32", choices=ITEM_BYTES, help="of the parameters (default: float32)")
    plan.add_argument("--bucket-bytes", default=BUCKET_BYTES, type=_positive, metavar="N", help="default: 25 MiB")
    plan.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    plan.set_defaults(run=_plan)
    return parser


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    shape = tuple(int(size) if size.isascii() and size.isdecimal() else 0 for size in sizes)
    if min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape: write positive sizes joined by x, as 1000x1000 or 10")
    return shape


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _plan(arguments: argparse.Namespace) -> int:
    plan = _describe(arguments.shapes, arguments.world_size, arguments.dtype, arguments.bucket_bytes)
    try:
        print(json.dumps(plan, indent=2) if arguments.json else _as_text(plan), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries once more when it exits
        if not isinstance(error, BrokenPipeError):  # of `| head` nobody wants to hear
            print(f"dist-asgd: cannot write the plan: {error}", file=sys.stderr)
        return 1
    return 0


def _describe(shapes: Sequence[tuple[int, ...]], world_size: int, dtype: str, bucket_bytes: int) -> dict[str, Any]:
    numels = [math.prod(shape) for shape in shapes]
    item = ITEM_BYTES[dtype]
    layouts = plan_buckets(numels, world_size=world_size, max_numel=bucket_bytes // item)
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
    masters = 4 * per_rank if item < 4 else 0
    # torch, from the first step: ax in the parameter's dtype; step, eta and mu of each parameter as fp32 tensors.
    dense = sum(numels) * item + 3 * 4 * len(numels)
    return {
        "world_size": world_size,
        "dtype": dtype,
        "buckets": buckets,
        "bytes_per_rank": {
            "before_averaging": masters,
            "averaging": masters + max(item, 4) * per_rank,
            "of_which_masters": masters,
            "torch_asgd": dense,
        },
    }


def _as_text(plan: dict[str, Any]) -> str:
    columns = ("parameters", "elements", "padding", "elements_per_rank")
    buckets = plan["buckets"]
    rows = [[str(index), *(f"{bucket[name]:,}" for name in columns)] for index, bucket in enumerate(buckets)]
    rows.append(["total", *(f"{sum(bucket[name] for bucket in buckets):,}" for name in columns)])
    sizes = plan["bytes_per_rank"]
    masters = f" ({_size(sizes['of_which_masters'])} of it fp32 masters)" if sizes["of_which_masters"] else ""
    memory = [
        ["ShardedASGD before averaging", _size(sizes["before_averaging"])],
        ["ShardedASGD once averaging", _size(sizes["averaging"]) + masters],
        ["torch.optim.ASGD", _size(sizes["torch_asgd"])],
    ]
    heading = f"{plan['dtype']} parameters over {plan['world_size']} rank{'s' if plan['world_size'] > 1 else ''}"
    table = [["bucket", *(name.replace("_", " ") for name in columns)], *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    lines += ["", "optimizer state per rank", *(f"  {name:<30}{size}" for name, size in memory)]
    return "\n".join([heading, "", *lines])


def _size(count: int) -> str:
    if count < 1024:
        return f"{count} B"
    power = min((count.bit_length() - 1) // 10, 4)
    return f"{count / 1024**power:.2f} {('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"
