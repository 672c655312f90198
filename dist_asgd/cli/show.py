"""``dist-asgd show``: lists the tensors and values of a checkpoint, and the files that they are stored in."""

from __future__ import annotations

import argparse
import fnmatch
import math
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.export.from_checkpoint import keys_in_average, names_of_averages, stock_manifest
from dist_asgd.checkpoint.format.dcp_metadata import StoredChunk, stored_chunk
from dist_asgd.checkpoint.format.entries import SavedTensor, dtype_name
from dist_asgd.checkpoint.format.json_values import decode
from dist_asgd.checkpoint.format.manifest import MANIFEST, STOCK, Manifest, read_manifest
from dist_asgd.checkpoint.loading.ranges import read_record
from dist_asgd.checkpoint.state.mismatches import truncate
from dist_asgd.checkpoint.stock.metadata import read_stock_metadata
from dist_asgd.cli.arguments import add_average_argument, add_checkpoint_arguments
from dist_asgd.cli.output import format_bytes, printable, table, write
from dist_asgd.cli.urls import find_checkpoint, storage_options

HELP = "what is in a checkpoint: tensors, where they are stored, values"
MAX_FILES = 3  # files named in the row of a tensor
MAX_VALUE = 80  # characters of a value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the checkpoint and which of its entries are shown."""
    add_checkpoint_arguments(parser)
    parser.add_argument("--keys", default="*", metavar="GLOB", help="only entries with such keys, as 'model.*'")
    add_average_argument(parser, "only the tensors of an average")


def run(arguments: argparse.Namespace) -> int:
    """Prints what a checkpoint of dist_asgd or of ``torch.distributed.checkpoint`` says of itself. Returns 0."""
    checkpoint = find_checkpoint(arguments.url, storage_options(arguments), arguments.step)
    sizes = checkpoint.sizes()
    name = MANIFEST if MANIFEST in sizes else STOCK
    data = read_record(checkpoint.storage, checkpoint.directory, name, sizes)
    contents, manifest = _manifest_report(data) if name == MANIFEST else _stock_report(data)
    report = {"url": checkpoint.url, "bytes": sum(sizes.values()), **contents, "averages": names_of_averages(manifest)}
    if arguments.average is not False:
        keys = keys_in_average(manifest, None if arguments.average is True else arguments.average)
        report |= {"tensors": {key: contents["tensors"][key] for key in keys}, "values": {}}
    for kind in ("tensors", "values"):
        report[kind] = {key: entry for key, entry in report[kind].items() if fnmatch.fnmatchcase(key, arguments.keys)}
    write(report if arguments.json else _report_text(report))
    return 0


def _manifest_report(data: bytes) -> tuple[dict[str, Any], Manifest]:
    manifest = read_manifest(data)
    report = {
        "format": "dist_asgd",
        "step": manifest.step,
        "world_size": manifest.world_size,
        "created": manifest.created,
        "versions": dict(manifest.versions),
        "files": {name: file.size for name, file in manifest.files.items()},
        "tensors": {
            key: _tensor_report(tensor.saved, _stored_chunks(manifest, key)) for key, tensor in manifest.tensors.items()
        },
        "values": {key: value.encoded for key, value in manifest.values.items()},
    }
    return report, manifest


def _stored_chunks(manifest: Manifest, key: str) -> list[StoredChunk]:
    return [stored_chunk(chunk.box, manifest.items[chunk.item]) for chunk in manifest.tensors[key].chunks]


def _stock_report(data: bytes) -> tuple[dict[str, Any], Manifest]:
    stock = read_stock_metadata(data)
    report = {
        "format": "torch.distributed.checkpoint",
        "tensors": {key: _tensor_report(tensor.saved, list(tensor.chunks)) for key, tensor in stock.tensors.items()},
        "values": dict.fromkeys(stock.objects),
    }
    return report, stock_manifest(stock)


def _tensor_report(saved: SavedTensor, chunks: list[StoredChunk]) -> dict[str, Any]:
    return {
        "dtype": dtype_name(saved.dtype),
        "shape": list(saved.shape),
        "bytes": math.prod(saved.shape) * saved.dtype.itemsize,
        "chunks": [
            {
                "offsets": list(chunk.box.offsets),
                "sizes": list(chunk.box.sizes),
                "file": chunk.path,
                "start": chunk.offset,
                "stop": chunk.offset + chunk.length,
            }
            for chunk in chunks
        ],
    }


def _report_text(report: Mapping[str, Any]) -> str:
    is_stock = "step" not in report
    facts = [["format", report["format"]], ["size", format_bytes(report["bytes"])]]
    if not is_stock:
        created = datetime.fromtimestamp(report["created"], timezone.utc)
        versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        facts += [["step", str(report["step"])], ["ranks", str(report["world_size"])]]
        facts += [["saved", f"{created:%Y-%m-%d %H:%M:%S} UTC"], ["by", printable(versions)]]
        facts += [["files", str(len(report["files"]))]]
    if report["averages"]:
        facts += [["averages", printable(", ".join(report["averages"]))]]
    sections = [printable(report["url"]), table(facts, left_aligned=(0, 1))]
    if report["tensors"]:
        rows = [_tensor_row(key, tensor) for key, tensor in report["tensors"].items()]
        sections.append(table([["tensor", "dtype", "shape", "size", "stored in"], *rows], left_aligned=(0, 1, 2, 4)))
    if report["values"]:
        # The metadata of stock checkpoints names values without having them.
        rows = [[printable(key), "" if is_stock else _value(key, encoded)] for key, encoded in report["values"].items()]
        sections.append(table([["value", ""], *rows], left_aligned=(0, 1)))
    return "\n\n".join(sections)


def _tensor_row(key: str, tensor: Mapping[str, Any]) -> list[str]:
    chunks = tensor["chunks"]
    files = list(dict.fromkeys(chunk["file"] for chunk in chunks))
    more = f" and {len(files) - MAX_FILES} more" if len(files) > MAX_FILES else ""
    parts = f"{len(chunks)} parts: " if len(chunks) > 1 else ""
    stored = f"{parts}{' '.join(files[:MAX_FILES])}{more}"
    return [printable(key), tensor["dtype"], str(tensor["shape"]), format_bytes(tensor["bytes"]), printable(stored)]


def _value(key: str, encoded: Any) -> str:
    """Returns a value for display, or why it cannot be decoded."""
    try:
        text = repr(decode(encoded, key))
    except CheckpointError as error:
        text = str(error)
    return truncate(printable(text), MAX_VALUE)
