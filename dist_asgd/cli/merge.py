"""``dist-asgd merge``: writes the weighted mean of checkpoints as a new checkpoint, or as a file for others."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict

from dist_asgd.checkpoint.merging.merge import MergeReport, checked_job, require_one_writer, run_merge
from dist_asgd.checkpoint.merging.target import TARGETS
from dist_asgd.checkpoint.merging.weights import DECAYS
from dist_asgd.cli.arguments import add_average_argument, add_output_and_storage_options
from dist_asgd.cli.output import format_bytes, printable, progress_bar, table, write
from dist_asgd.cli.urls import UsageError, storage_options

HELP = "write the weighted mean of checkpoints as a new checkpoint, or as a file of safetensors"
SHOWN = 10  # names that a line lists


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the sources, their weights, and the target and its format."""
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="path or fsspec URL of a checkpoint (stock DCP ones, too), of a run, of a file of safetensors, or of a "
        "directory of Hugging Face",
    )
    parser.add_argument(
        "out",
        metavar="OUT",
        help="path or URL, where nothing is yet: of a checkpoint; of a file, by its suffix; or, with a / at its end, "
        "of a directory, which gets the layout of Hugging Face. Storage options are for the kind of store of the first "
        "SOURCE that is no path, or of OUT",
    )
    parser.add_argument("--format", choices=TARGETS, help="default: by the form of OUT")
    parser.add_argument(
        "--steps",
        metavar="STEPS",
        help="of runs: 1000:2000:100 for each 100th, which all must exist; 1000:2000 for those that exist; or 10,20,40 "
        "(default: the newest)",
    )
    _add_weights(parser)
    add_average_argument(parser, "averages in place of parameters")
    parser.add_argument(
        "--entry", default="model", metavar="NAME", help="of what was saved; '' for all tensors (default: model)"
    )
    add_output_and_storage_options(parser)


def _add_weights(parser: argparse.ArgumentParser) -> None:
    """Declares the three ways to say the weights, which exclude one another."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--weights", type=_weights, metavar="W,W,...", help="of the checkpoints, in order; divided by their sum"
    )
    which.add_argument(
        "--decay",
        choices=[*DECAYS],
        help="weights by which checkpoints of a constant learning rate stand for its decay; linear is the mean",
    )
    which.add_argument(
        "--ema-width",
        type=float,
        metavar="WIDTH",
        help="the power average of this width, as a share of the training, out of those that the checkpoints have",
    )


def run(arguments: argparse.Namespace) -> int:
    """Merges, and prints what was written and with which weights; standard error names what has no mean. Returns 0."""
    require_one_writer()
    try:
        job = checked_job(
            arguments.sources,
            arguments.out,
            storage_options(arguments),
            steps=arguments.steps,
            weights=arguments.weights,
            decay=arguments.decay,
            ema_width=arguments.ema_width,
            average=arguments.average,
            entry=arguments.entry,
            format=arguments.format,
        )
        with progress_bar("merged", hidden=arguments.json) as progress:
            report = run_merge(job, progress)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    if arguments.json:
        write(asdict(report))
        return 0
    _print_report(report)
    return 0


def _print_report(report: MergeReport) -> None:
    fit = "" if report.profile_error is None else f", a profile met to {100 * report.profile_error:.2g} %"
    step = "" if report.step is None else f" up to step {report.step}"
    head = f"{printable(report.url)}: {report.tensors} tensors, sources: {len(report.weights)}{step}, "
    rows = [[f"{weight:.6g}", printable(name)] for name, weight in report.weights.items()]
    write(f"{head}{format_bytes(report.bytes)}{fit}\n{table(rows, left_aligned=(1,))}")
    for names, what in (
        (report.from_last, "of the last source, as they have no mean"),
        (report.own, "not averages, as they have none"),
        (report.left_out, "left out, as they are no tensors"),
    ):
        if names:
            print(f"dist-asgd: {what}: {printable(_listed(names))}", file=sys.stderr)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _weights(text: str) -> list[float]:
    try:
        return [float(weight) for weight in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are no weights: expected numbers like 1,2,3") from None
