"""``dist-asgd export``: writes tensors of a checkpoint for torch.load, safetensors or transformers."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from typing import Any

from dist_asgd.checkpoint.export.formats import FORMATS, SUFFIXES, Exported, FileFormat, format_by, safetensors_file
from dist_asgd.checkpoint.export.from_checkpoint import (
    ExportSource,
    StockExportSource,
    entry_names,
    tensors_matching,
    tensors_of,
    with_averages,
)
from dist_asgd.checkpoint.export.huggingface import MAX_SHARD_BYTES, split_into_files, write_directory
from dist_asgd.checkpoint.format.manifest import MANIFEST, Manifest, read_manifest
from dist_asgd.checkpoint.loading.sources import open_checkpoint
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.checkpoint.storage.url import LOCAL, protocol_of
from dist_asgd.cli.arguments import add_average_argument, add_checkpoint_arguments
from dist_asgd.cli.output import ReportProgress, format_bytes, note, printable, progress_bar, write
from dist_asgd.cli.urls import (
    OpenedCheckpoint,
    UsageError,
    find_checkpoint,
    open_parent,
    open_storage,
    storage_options,
)

HELP = "write tensors of a checkpoint to one file, for torch.load or safetensors, or to a directory for transformers"
DIRECTORY = "huggingface"  # the value of --format that writes a directory
DEFAULT_ENTRY = "model"
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the checkpoint, the output and its format, and which tensors are exported."""
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "out",
        metavar="OUT",
        help="path or URL of the file; replaced if it is there. Or, with a / at its end, of a directory, which gets "
        "the layout of Hugging Face. Storage options are for URL, and for OUT where both are on one kind of store or "
        "URL is a path",
    )
    parser.add_argument("--format", choices=[*FORMATS, DIRECTORY], help="default: by OUT's suffix")
    add_average_argument(parser, "averages in place of parameters")
    parser.add_argument(
        "--max-shard-size",
        type=_size,
        metavar="SIZE",
        help="of tensors in one file of a directory: bytes, or as 500MB, 2GiB (default: 5GB)",
    )
    parser.add_argument("--config", metavar="FILE", help="becomes config.json of a directory: checkpoints have none")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--entry", metavar="NAME", help="of what was saved; keys lose this prefix (default: model)")
    which.add_argument("--keys", metavar="GLOB", help="tensors with such keys, which stay whole, as 'model.layers.*'")


def run(arguments: argparse.Namespace) -> int:
    """Exports, and prints what was written; standard error names what could not be exported. Returns 0."""
    format_name = arguments.format or _format_of(arguments.out)
    configs = _read_config(arguments, format_name)
    checkpoint, target, name = _open(arguments, format_name)
    source, step = _open_source(checkpoint)
    saved = _select_tensors(source.manifest, arguments)
    use_averages = arguments.average is not False
    average = None if arguments.average is True else arguments.average
    tensors = with_averages(source, saved, average) if use_averages else saved
    with progress_bar("exported", hidden=arguments.json) as progress:
        file_of = _with_progress(FORMATS.get(format_name, safetensors_file), tensors, progress)
        if format_name == DIRECTORY:
            files = split_into_files(tensors, arguments.max_shard_size or MAX_SHARD_BYTES)
            size = write_directory(target, files, configs, source, file_of)
        else:
            size = target.write(name, file_of(source, tensors))
    report = {"out": f"{target.url}/{name}", "bytes": size, "step": step, "tensors": len(tensors)}
    pairs = zip(tensors, saved, strict=True)
    unchanged = [tensor.name for tensor, before in pairs if tensor == before] if use_averages else None
    entry = f"{arguments.entry or DEFAULT_ENTRY}."
    left_out = [] if arguments.keys else [key for key in source.manifest.values if key.startswith(entry)]
    if arguments.json:
        write({**report, "not_averaged": unchanged, "left_out": left_out})
        return 0
    not_averaged = f", {len(unchanged)} of them not averages: {_listed(unchanged)}" if unchanged else ""
    of_step = "" if step is None else f" of step {step}"
    write(printable(f"{report['out']}: {len(tensors)} tensors{of_step}, {format_bytes(size)}{not_averaged}"))
    if left_out:
        note(f"left out, as they are no tensors: {_listed(left_out)}")
    if format_name == DIRECTORY and not configs:
        note("there is no config.json, which checkpoints do not have: put it there")
    return 0


def _open(arguments: argparse.Namespace, format_name: str) -> tuple[OpenedCheckpoint, Storage, str]:
    """Returns the checkpoint, the folder to write to and the file's name, which is "" where a directory is written."""
    options = storage_options(arguments)
    source, out = protocol_of(arguments.url), protocol_of(arguments.out)
    out_options = options if out != LOCAL and source in (out, LOCAL) else {}
    if format_name == DIRECTORY:
        target, name = open_storage(arguments.out, out_options), ""
    else:
        target, name = open_parent(arguments.out, out_options)
    return find_checkpoint(arguments.url, {} if source == LOCAL != out else options, arguments.step), target, name


def _read_config(arguments: argparse.Namespace, format_name: str) -> dict[str, bytes]:
    """Returns the file of ``--config`` under the name that transformers reads; nothing without the option."""
    if format_name != DIRECTORY and (arguments.config or arguments.max_shard_size):
        raise UsageError(f"--config and --max-shard-size are for --format {DIRECTORY}")
    if arguments.config is None:
        return {}
    try:
        with open(arguments.config, "rb") as file:
            return {"config.json": file.read()}
    except OSError as error:
        raise UsageError(f"cannot read {arguments.config}: {error.strerror}") from error


def _open_source(checkpoint: OpenedCheckpoint) -> tuple[ExportSource, int | None]:
    """Returns what tensors are read from, and the step, which stock checkpoints do not have."""
    if MANIFEST not in checkpoint.sizes():
        return StockExportSource.open(checkpoint.storage, checkpoint.directory), None
    manifest = read_manifest(open_checkpoint(checkpoint.storage, checkpoint.directory))
    return ExportSource(checkpoint.storage, checkpoint.directory, manifest), manifest.step


def _format_of(out: str) -> str:
    format_name = DIRECTORY if out.endswith("/") else format_by(out)
    if format_name is None:
        raise UsageError(
            f"OUT ends in none of {', '.join(SUFFIXES)}: say --format torch or --format safetensors; or, for a "
            "directory as Hugging Face has it, end it with / or say --format huggingface"
        )
    return format_name


def _select_tensors(manifest: Manifest, arguments: argparse.Namespace) -> list[Exported]:
    if arguments.keys is not None:
        return tensors_matching(manifest, arguments.keys)
    if arguments.entry is None and DEFAULT_ENTRY not in entry_names(manifest):
        raise UsageError(
            f"the checkpoint has no {DEFAULT_ENTRY!r}: say --entry or --keys. It has {entry_names(manifest)}"
        )
    return tensors_of(manifest, DEFAULT_ENTRY if arguments.entry is None else arguments.entry)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _with_progress(file_of: FileFormat, tensors: Sequence[Exported], progress: ReportProgress) -> FileFormat:
    """Wraps ``file_of`` so that each chunk of a file is reported; ``tensors``: those of all files."""
    total = sum(tensor.nbytes for tensor in tensors)

    def reporting(source: Any, tensors: Sequence[Exported]) -> Iterator[bytes | memoryview]:
        for chunk in file_of(source, tensors):
            yield chunk
            progress(len(chunk), total)

    return reporting


def _size(text: str) -> int:
    found = re.fullmatch("([0-9]{1,18})([KMGT]i?B|)", text)
    size = int(found[1]) * UNITS[found[2]] if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 5GB, 500MB, 2GiB, or a number of bytes")
    return size
