"""``dist-asgd plan``: reports what each rank would keep, send and save, beside torch's optimizers under DDP."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch

from dist_asgd.cli.arguments import add_json_argument, positive
from dist_asgd.cli.output import format_bytes, table, write
from dist_asgd.cli.urls import UsageError
from dist_asgd.planning.estimate import Estimate, Planner
from dist_asgd.planning.layouts import LAYOUTS, Layout, PlannedBucket
from dist_asgd.planning.model import ModelSizes, ParameterSize, made_by
from dist_asgd.sharding.layout import DEVICE_BUCKET_BYTES, HOST_BUCKET_BYTES

HELP = "what each rank would keep, send and save"

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BUCKET_BYTES = {"gloo": HOST_BUCKET_BYTES, "nccl": DEVICE_BUCKET_BYTES}  # the defaults of ShardedASGD
BYTES_PER_GBIT, BYTES_PER_MB = 1e9 / 8, 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the model, how it is spread, the averages, and the speed of link and store."""
    parser.description = parser.epilog = None  # the other commands' statuses 1 and 3 are about checkpoints
    parser.add_argument(
        "model",
        nargs="+",
        type=_function_or_shape,
        metavar="MODEL",
        help="package.module:function, which returns the model; or shapes of its parameters in order, as 1000x1000",
    )
    parser.add_argument("--world-size", required=True, type=positive, metavar="N", help="number of ranks")
    parser.add_argument("--layout", default="zero", choices=LAYOUTS, help="how ranks share the model (default: zero)")
    parser.add_argument("--replicas", default=2, type=positive, metavar="N", help="of hsdp (default: 2)")
    parser.add_argument(
        "--cut", action="append", default=[], metavar="GLOB", help="names of parameters that tp cuts, repeatable"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of parameters (default: the model's, and float32 of shapes)")
    parser.add_argument("--averages", default=1, type=positive, metavar="N", help="number of averages (default: 1)")
    parser.add_argument(
        "--bucket-bytes", type=positive, metavar="N", help="default: 64 MiB with nccl, 25 MiB with gloo"
    )
    parser.add_argument("--backend", default="nccl", choices=["nccl", "gloo"], help="of collectives (default: nccl)")
    parser.add_argument("--link", type=_speed, metavar="GBIT", help="Gbit/s that a rank sends: shows times")
    parser.add_argument("--store", type=_speed, metavar="MB", help="MB/s that a rank writes: shows times")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the estimates. Returns 0. Raises ``UsageError`` for a bad model or options that do not fit together."""
    try:
        model = _model(arguments)
        layout = Layout.of(arguments.layout, arguments.world_size, arguments.replicas, arguments.cut)
        layout.require_names(model)
    except ValueError as error:
        raise UsageError(str(error)) from error
    bucket_bytes = arguments.bucket_bytes or BUCKET_BYTES[arguments.backend]
    planner = Planner(model, layout, arguments.averages, bucket_bytes, arguments.backend == "gloo")
    report = _report(planner, arguments.link, arguments.store)
    write(report if arguments.json else _report_text(report))
    return 0


def _speed(text: str) -> float:
    try:
        speed = float(text)
    except ValueError:
        speed = math.nan
    if not 0 < speed < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return speed


def _model(arguments: argparse.Namespace) -> ModelSizes:
    """Returns the sizes of the model. Raises ``ValueError`` where there is none."""
    functions = [given for given in arguments.model if isinstance(given, str)]
    if not functions:
        dtype = DTYPES[arguments.dtype or "float32"]
        return ModelSizes([ParameterSize(str(n), shape, dtype) for n, shape in enumerate(arguments.model)])
    if len(arguments.model) > 1:
        raise ValueError(f"{functions[0]} makes the whole model: give it alone, or shapes only")
    model = made_by(functions[0])
    return model.cast(DTYPES[arguments.dtype]) if arguments.dtype else model


def _function_or_shape(text: str) -> str | tuple[int, ...]:
    if ":" in text:
        return text
    shape = tuple(int(size) if size.isascii() and size.isdecimal() else 0 for size in text.split("x"))
    if min(shape) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape: write positive sizes joined by x, as 1000x1000 or 10, or package.module:function"
        )
    return shape


def _report(planner: Planner, link: float | None, store: float | None) -> dict[str, Any]:
    """Returns what ``--json`` prints.

    Args:
        link: Gbit/s that a rank sends; None leaves out times of a step.
        store: MB/s that a rank writes; None leaves out times of a checkpoint.
    """
    parameters, layout = planner.model.parameters, planner.layout
    return {
        "world_size": layout.world_size,
        "layout": layout.name,
        "parameters": len(parameters),
        "elements": sum(parameter.numel for parameter in parameters),
        "bytes": sum(parameter.nbytes for parameter in parameters),
        "buckets": [_bucket(bucket) for bucket in planner.buckets()],
        "ways": {estimate.name: _way(estimate, link, store) for estimate in planner.estimates()},
    }


def _bucket(bucket: PlannedBucket) -> dict[str, int]:
    elements = sum(span.numel for span in bucket.layout.spans)
    return {
        "parameters": len(bucket.layout.spans),
        "elements": elements,
        "padding": bucket.layout.numel - elements,
        "elements_per_rank": bucket.layout.shard_numel,
    }


def _way(estimate: Estimate, link: float | None, store: float | None) -> dict[str, Any]:
    times: dict[str, float] = {}
    if link is not None:
        times["seconds_to_send"] = estimate.sent / (link * BYTES_PER_GBIT)
    if store is not None:
        times["seconds_to_write"] = estimate.written / (store * BYTES_PER_MB)
    return {
        "parameters": estimate.parameters,
        "gradients": estimate.gradients,
        "optimizer_state": estimate.state,
        "averages": estimate.averages,
        "memory": estimate.memory,
        "sent": estimate.sent,
        "checkpoint": estimate.checkpoint,
        "written": estimate.written,
        **times,
    }


ROWS = {
    "parameters": "parameters and buffers",
    "gradients": "gradients",
    "optimizer_state": "optimizer state before averages",
    "averages": "averages, once they begin",
    "memory": "together",
    "sent": "sent in a step",
    "seconds_to_send": "  at the speed of the link",
    "checkpoint": "checkpoint of all ranks",
    "written": "written by the rank with most",
    "seconds_to_write": "  at the speed of the store",
}


def _report_text(report: dict[str, Any]) -> str:
    ways, buckets = report["ways"], report["buckets"]
    first = next(iter(ways.values()))
    rows = [[title, *(_cell(key, way[key]) for way in ways.values())] for key, title in ROWS.items() if key in first]
    ranks = f"{report['world_size']} rank{'s' if report['world_size'] > 1 else ''}"
    size = f"{report['elements']:,} elements ({format_bytes(report['bytes'])})"
    padding = sum(bucket["padding"] for bucket in buckets)
    return "\n".join(
        [
            f"{report['parameters']:,} parameters of {size}, {report['layout']} over {ranks}; bytes of one rank",
            "",
            table([["", *ways], *rows], left_aligned=[0]),
            "",
            f"ShardedASGD has {len(buckets):,} bucket{'s' * (len(buckets) != 1)}, padding is {padding:,} elements.",
            *_notes(report["layout"]),
        ]
    )


def _cell(key: str, value: float) -> str:
    return f"{value:,.3f} s" if key.startswith("seconds") else format_bytes(int(value))


def _notes(layout: str) -> list[str]:
    """Returns sentences on what a reader might take the figures for."""
    notes = ["Activations, messages under way and FSDP2's gathered blocks come on top."]
    if layout in ("fsdp", "hsdp"):
        notes.append("FSDP2 gathers each parameter twice, but those of its outermost module once.")
    if layout in ("zero", "ddp"):
        notes.append("DDP has gradients twice, unless it is told gradient_as_bucket_view=True.")
    if layout == "tp":
        notes.append("What tensor parallelism sends depends on the activations, and is not counted.")
    return notes
