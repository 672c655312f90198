"""``dist-asgd show``: what is in a checkpoint, and where."""

from __future__ import annotations

import argparse
import fnmatch
import math
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.format.dcp_metadata import StoredChunk, stored_chunk
from dist_asgd.checkpoint.format.entries import SavedTensor
from dist_asgd.checkpoint.format.json_values import decode
from dist_asgd.checkpoint.format.manifest import NAME, STOCK, Manifest, dtype_name, in_directory, read_manifest
from dist_asgd.checkpoint.stock.metadata import read_stock_metadata
from dist_asgd.cli.output import printable, readable, table, write
from dist_asgd.cli.places import OpenedCheckpoint, checkpoint_at, options_of

FILES = 3  # that are named of one tensor
LONGEST = 80  # characters of a value


def run(arguments: argparse.Namespace) -> int:
    options = options_of(arguments.storage_option, arguments.storage_options)
    place = checkpoint_at(arguments.url, options, arguments.step)
    sizes = place.sizes()
    found = _of_manifest(place) if NAME in sizes else _of_stock(place)
    found = {"url": place.url, "bytes": sum(sizes.values()), **found}
    for kind in ("tensors", "values"):
        found[kind] = {key: entry for key, entry in found[kind].items() if _matches(key, arguments.keys)}
    write(found if arguments.json else _as_text(found))
    return 0


def _matches(key: str, pattern: str | None) -> bool:
    return pattern is None or fnmatch.fnmatchcase(key, pattern)


def _of_manifest(place: OpenedCheckpoint) -> dict[str, Any]:
    manifest = read_manifest(place.storage.read(in_directory(place.directory, NAME)))
    return {
        "format": "dist_asgd",
        "step": manifest.step,
        "world_size": manifest.world_size,
        "created": manifest.created,
        "versions": dict(manifest.versions),
        "files": {name: file.size for name, file in manifest.files.items()},
        "tensors": {key: _tensor(tensor.saved, _chunks(manifest, key)) for key, tensor in manifest.tensors.items()},
        "values": {key: value.encoded for key, value in manifest.values.items()},
    }


def _chunks(manifest: Manifest, key: str) -> list[StoredChunk]:
    return [stored_chunk(chunk.box, manifest.items[chunk.item]) for chunk in manifest.tensors[key].chunks]


def _of_stock(place: OpenedCheckpoint) -> dict[str, Any]:
    stock = read_stock_metadata(place.storage.read(in_directory(place.directory, STOCK)))
    return {
        "format": "torch.distributed.checkpoint",
        "tensors": {key: _tensor(tensor.saved, list(tensor.chunks)) for key, tensor in stock.tensors.items()},
        "values": dict.fromkeys(stock.objects),
    }


def _tensor(saved: SavedTensor, chunks: list[StoredChunk]) -> dict[str, Any]:
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


def _as_text(found: Mapping[str, Any]) -> str:
    is_stock = "step" not in found
    facts = [["format", found["format"]], ["size", readable(found["bytes"])]]
    if not is_stock:
        created = datetime.fromtimestamp(found["created"], timezone.utc)
        facts += [["step", str(found["step"])], ["ranks", str(found["world_size"])]]
        facts += [["saved", f"{created:%Y-%m-%d %H:%M:%S} UTC"], ["by", _versions(found["versions"])]]
        facts += [["files", str(len(found["files"]))]]
    sections = [printable(found["url"]), table(facts, left=(0, 1))]
    if found["tensors"]:
        rows = [_row(key, tensor) for key, tensor in found["tensors"].items()]
        sections.append(table([["tensor", "dtype", "shape", "size", "stored in"], *rows], left=(0, 1, 2, 4)))
    if found["values"]:
        shown = {key: "" if is_stock else _short(key, value) for key, value in found["values"].items()}
        rows = [[printable(key), value] for key, value in shown.items()]
        sections.append(table([["value", ""], *rows], left=(0, 1)))
    return "\n\n".join(sections)


def _versions(versions: Mapping[str, str]) -> str:
    return printable(", ".join(f"{name} {version}" for name, version in versions.items()))


def _row(key: str, tensor: Mapping[str, Any]) -> list[str]:
    chunks = tensor["chunks"]
    files = list(dict.fromkeys(chunk["file"] for chunk in chunks))
    more = f" and {len(files) - FILES} more" if len(files) > FILES else ""
    parts = f"{len(chunks)} parts: " if len(chunks) > 1 else ""
    stored = f"{parts}{' '.join(files[:FILES])}{more}"
    return [printable(key), tensor["dtype"], str(tensor["shape"]), readable(tensor["bytes"]), printable(stored)]


def _short(key: str, encoded: Any) -> str:
    try:
        text = repr(decode(encoded, key))
    except CheckpointError as error:
        text = str(error)
    text = printable(text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
