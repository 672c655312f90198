"""``dist-asgd plan``: how replicated parameters are cut over ranks, and what memory that takes."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

from dist_asgd.cli.output import readable, table, write
from dist_asgd.sharding.layout import plan_buckets

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
BUCKET_BYTES = 25 * 2**20  # as ShardedASGD's


def run(arguments: argparse.Namespace) -> int:
    plan = _describe(arguments.shapes, arguments.world_size, arguments.dtype, arguments.bucket_bytes)
    write(plan if arguments.json else _as_text(plan))
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
    masters = f" ({readable(sizes['of_which_masters'])} of it fp32 masters)" if sizes["of_which_masters"] else ""
    memory = [
        ["ShardedASGD before averaging", readable(sizes["before_averaging"])],
        ["ShardedASGD once averaging", readable(sizes["averaging"]) + masters],
        ["torch.optim.ASGD", readable(sizes["torch_asgd"])],
    ]
    heading = f"{plan['dtype']} parameters over {plan['world_size']} rank{'s' if plan['world_size'] > 1 else ''}"
    lines = [table([["bucket", *(name.replace("_", " ") for name in columns)], *rows])]
    lines += ["", "optimizer state per rank", *(f"  {name:<30}{size}" for name, size in memory)]
    return "\n".join([heading, "", *lines])
