"""``dist-asgd export``: a checkpoint's tensors as one file for torch.load or safetensors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from dist_asgd.checkpoint.export import (
    Exported,
    Source,
    StockSource,
    averaged,
    entries,
    matching,
    safetensors_file,
    tensors_of,
    torch_file,
)
from dist_asgd.checkpoint.manifest import NAME, Manifest, read_manifest
from dist_asgd.checkpoint.sources import open_checkpoint
from dist_asgd.checkpoint.stores import Chunk
from dist_asgd.commands.output import Progress, printable, progress_bar, readable, write
from dist_asgd.commands.places import LOCAL, Place, UsageError, checkpoint_at, file_at, options_of, protocol_of

FORMATS = {"torch": torch_file, "safetensors": safetensors_file}
SUFFIXES = {".pt": "torch", ".pth": "torch", ".bin": "torch", ".safetensors": "safetensors"}
DEFAULT = "model"


def run(arguments: argparse.Namespace) -> int:
    options = options_of(arguments.storage_option, arguments.storage_options)
    file_of = FORMATS[arguments.format or _format_by(arguments.out)]
    source, out = protocol_of(arguments.url), protocol_of(arguments.out)
    target, name = file_at(arguments.out, options if out != LOCAL and source in (out, LOCAL) else {})
    place = checkpoint_at(arguments.url, {} if source == LOCAL != out else options, arguments.step)
    checkpoint, step = _opened(place)
    manifest = checkpoint.manifest
    raw = _chosen(manifest, arguments)
    tensors = averaged(checkpoint, raw) if arguments.average else raw
    with progress_bar("exported", hidden=arguments.json) as progress:
        chunks = file_of(checkpoint, tensors)
        size = target.write(name, _watched(chunks, sum(tensor.nbytes for tensor in tensors), progress))
    unchanged = [tensor.name for tensor, before in zip(tensors, raw, strict=True) if tensor == before]
    done = {"out": f"{target.url}/{name}", "bytes": size, "step": step, "tensors": len(tensors)}
    left_out = [] if arguments.keys else _values_below(manifest, arguments.entry or DEFAULT)
    if arguments.json:
        write({**done, "not_averaged": unchanged if arguments.average else None, "left_out": left_out})
        return 0
    of_these = (
        f", {len(unchanged)} of them not averages: {_listed(unchanged)}" if unchanged and arguments.average else ""
    )
    of_step = "" if step is None else f" of step {step}"
    write(printable(f"{done['out']}: {len(tensors)} tensors{of_step}, {readable(size)}{of_these}"))
    if left_out:
        print(f"dist-asgd: left out, as they are no tensors: {printable(_listed(left_out))}", file=sys.stderr)
    return 0


def _opened(place: Place) -> tuple[Source, int | None]:
    """A checkpoint, and its step if it tells."""
    if NAME not in place.sizes():
        return StockSource.open(place.storage, place.directory), None
    manifest = read_manifest(open_checkpoint(place.storage, place.directory))
    return Source(place.storage, place.directory, manifest), manifest.step


def _format_by(out: str) -> str:
    address = out.partition("?")[0]
    for suffix, name in SUFFIXES.items():
        if address.endswith(suffix):
            return name
    raise UsageError(f"OUT ends in none of {', '.join(SUFFIXES)}: say --format torch or --format safetensors")


def _chosen(manifest: Manifest, arguments: argparse.Namespace) -> list[Exported]:
    if arguments.keys is not None:
        return matching(manifest, arguments.keys)
    entry = arguments.entry
    if entry is None:
        entry = DEFAULT
        if entry not in entries(manifest):
            raise UsageError(f"the checkpoint has no {entry!r}: say --entry or --keys. It has {entries(manifest)}")
    return tensors_of(manifest, entry)


def _values_below(manifest: Manifest, entry: str) -> list[str]:
    return [key for key in manifest.values if key.startswith(f"{entry}.")]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _watched(chunks: Iterator[Chunk], total: int, progress: Progress) -> Iterator[Any]:
    for chunk in chunks:
        yield chunk
        progress(len(chunk), total)
