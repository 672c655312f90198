"""``dist-asgd ls``: the checkpoints of a run."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import Any

from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.format.manifest import NAME, Manifest, read_manifest
from dist_asgd.checkpoint.retention import Directory, directories_of, newest_by_step
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.cli.output import ago, printable, readable, table, write
from dist_asgd.cli.places import NotFound, opened, options_of

COLUMNS = ("step", "size", "tensors", "ranks", "age", "state", "directory")


def run(arguments: argparse.Namespace) -> int:
    storage = opened(arguments.url, options_of(arguments.storage_option, arguments.storage_options))
    sizes = storage.sizes()
    found = directories_of(sizes)
    if not found:
        raise NotFound(f"{storage.url} has no checkpoints of a run: no directories step-..., that Checkpointer makes")
    counted = {directory.name for directory in newest_by_step(found).values()}
    manifests = _manifests(storage, found, sizes)
    rows = [_describe(storage, directory, sizes, manifests, directory.name in counted) for directory in found]
    if arguments.json:
        write({"url": storage.url, "checkpoints": rows})
    else:
        write(table([list(COLUMNS), *map(_row, rows)], left=(5, 6)))
    return 1 if any(row["state"] == "damaged" for row in rows) else 0


def _manifests(storage: Storage, found: list[Directory], sizes: Mapping[str, int]) -> dict[str, Manifest | str]:
    """By directory; what is wrong with it instead of a manifest that cannot be read."""
    names = [directory.name for directory in found if directory.is_committed]
    manifests: dict[str, Manifest | str] = {}
    for index, data in storage.read_ranges([(f"{name}/{NAME}", 0, sizes[f"{name}/{NAME}"]) for name in names]):
        try:
            manifest = read_manifest(data)
        except CheckpointError as error:
            manifests[names[index]] = str(error)
            continue
        wrong = [name for name, file in manifest.files.items() if sizes.get(f"{names[index]}/{name}") != file.size]
        manifests[names[index]] = f"{wrong[0]} is missing, or of another size" if wrong else manifest
    return manifests


def _describe(
    storage: Storage,
    directory: Directory,
    sizes: Mapping[str, int],
    manifests: Mapping[str, Manifest | str],
    is_counted: bool,
) -> dict[str, Any]:
    manifest = manifests.get(directory.name)
    row: dict[str, Any] = {"step": directory.step, "attempt": directory.attempt, "directory": directory.name}
    row["bytes"] = sum(size for path, size in sizes.items() if path.startswith(f"{directory.name}/"))
    if isinstance(manifest, Manifest):
        row |= {"tensors": len(manifest.tensors), "world_size": manifest.world_size, "created": manifest.created}
        return row | {"state": "committed" if is_counted else "replaced", "damage": None}
    row |= {"tensors": None, "world_size": None, "created": storage.modified(directory.name)}
    return row | {"state": "incomplete" if manifest is None else "damaged", "damage": manifest}


def _row(row: Mapping[str, Any]) -> list[str]:
    age = "" if row["created"] is None else ago(time.time() - row["created"])
    tensors, ranks = ("" if row[name] is None else f"{row[name]:,}" for name in ("tensors", "world_size"))
    state = row["state"] if row["damage"] is None else f"{row['state']}: {printable(row['damage'])}"
    return [str(row["step"]), readable(row["bytes"]), tensors, ranks, age, state, row["directory"]]
