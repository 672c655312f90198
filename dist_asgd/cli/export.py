"""``dist-asgd export``: a checkpoint's tensors as a file for torch.load or safetensors, or as transformers has them."""

from __future__ import annotations

import argparse
import sys
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
from dist_asgd.checkpoint.format.manifest import NAME, Manifest, read_manifest
from dist_asgd.checkpoint.loading.sources import open_checkpoint
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.cli.output import ReportProgress, printable, progress_bar, readable, write
from dist_asgd.cli.places import (
    LOCAL,
    OpenedCheckpoint,
    UsageError,
    checkpoint_at,
    file_at,
    opened,
    options_of,
    protocol_of,
)

DIRECTORY = "huggingface"
DEFAULT = "model"


def run(arguments: argparse.Namespace) -> int:
    kind = arguments.format or _format_by(arguments.out)
    configs = _configs(arguments, kind)
    place, target, name = _places(arguments, kind)
    checkpoint, step = _opened(place)
    raw = _chosen(checkpoint.manifest, arguments)
    are_averages = arguments.average is not False
    name_of = None if arguments.average is True else arguments.average
    tensors = with_averages(checkpoint, raw, name_of) if are_averages else raw
    with progress_bar("exported", hidden=arguments.json) as progress:
        file_of = _watched(FORMATS.get(kind, safetensors_file), sum(tensor.nbytes for tensor in tensors), progress)
        if kind == DIRECTORY:
            files = split_into_files(tensors, arguments.max_shard_size or MAX_SHARD_BYTES)
            size = write_directory(
                target, files, configs, lambda file: target.write(file.name, file_of(checkpoint, file.tensors))
            )
        else:
            size = target.write(name, file_of(checkpoint, tensors))
    done = {"out": f"{target.url}/{name}", "bytes": size, "step": step, "tensors": len(tensors)}
    unchanged = [tensor.name for tensor, before in zip(tensors, raw, strict=True) if tensor == before]
    left_out = [] if arguments.keys else _values_below(checkpoint.manifest, arguments.entry or DEFAULT)
    if arguments.json:
        write({**done, "not_averaged": unchanged if are_averages else None, "left_out": left_out})
        return 0
    of_these = f", {len(unchanged)} of them not averages: {_listed(unchanged)}" if unchanged and are_averages else ""
    of_step = "" if step is None else f" of step {step}"
    write(printable(f"{done['out']}: {len(tensors)} tensors{of_step}, {readable(size)}{of_these}"))
    if left_out:
        print(f"dist-asgd: left out, as they are no tensors: {printable(_listed(left_out))}", file=sys.stderr)
    if kind == DIRECTORY and not configs:
        print("dist-asgd: there is no config.json, which checkpoints do not have: put it there", file=sys.stderr)
    return 0


def _places(arguments: argparse.Namespace, kind: str) -> tuple[OpenedCheckpoint, Storage, str]:
    """The checkpoint, the folder that is written to, and the file's name; "" where the folder is what is written."""
    options = options_of(arguments.storage_option, arguments.storage_options)
    source, out = protocol_of(arguments.url), protocol_of(arguments.out)
    of_out = options if out != LOCAL and source in (out, LOCAL) else {}
    target, name = (opened(arguments.out, of_out), "") if kind == DIRECTORY else file_at(arguments.out, of_out)
    return checkpoint_at(arguments.url, {} if source == LOCAL != out else options, arguments.step), target, name


def _configs(arguments: argparse.Namespace, kind: str) -> dict[str, bytes]:
    if kind != DIRECTORY and (arguments.config or arguments.max_shard_size):
        raise UsageError(f"--config and --max-shard-size are for --format {DIRECTORY}")
    if arguments.config is None:
        return {}
    try:
        with open(arguments.config, "rb") as file:
            return {"config.json": file.read()}
    except OSError as error:
        raise UsageError(f"cannot read {arguments.config}: {error.strerror}") from error


def _opened(place: OpenedCheckpoint) -> tuple[ExportSource, int | None]:
    """A checkpoint, and its step if it tells."""
    if NAME not in place.sizes():
        return StockExportSource.open(place.storage, place.directory), None
    manifest = read_manifest(open_checkpoint(place.storage, place.directory))
    return ExportSource(place.storage, place.directory, manifest), manifest.step


def _format_by(out: str) -> str:
    found = DIRECTORY if out.endswith("/") else format_by(out)
    if found is None:
        raise UsageError(
            f"OUT ends in none of {', '.join(SUFFIXES)}: say --format torch or --format safetensors; or, for a "
            "directory as Hugging Face has it, end it with / or say --format huggingface"
        )
    return found


def _chosen(manifest: Manifest, arguments: argparse.Namespace) -> list[Exported]:
    if arguments.keys is not None:
        return tensors_matching(manifest, arguments.keys)
    entry = arguments.entry
    if entry is None:
        entry = DEFAULT
        if entry not in entry_names(manifest):
            raise UsageError(f"the checkpoint has no {entry!r}: say --entry or --keys. It has {entry_names(manifest)}")
    return tensors_of(manifest, entry)


def _values_below(manifest: Manifest, entry: str) -> list[str]:
    return [key for key in manifest.values if key.startswith(f"{entry}.")]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _watched(file_of: FileFormat, total: int, progress: ReportProgress) -> FileFormat:
    def watched(source: Any, tensors: Sequence[Exported]) -> Iterator[bytes | memoryview]:
        for chunk in file_of(source, tensors):
            yield chunk
            progress(len(chunk), total)

    return watched
