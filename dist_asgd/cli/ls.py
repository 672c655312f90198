"""``dist-asgd ls``: lists the checkpoints of a run, with their sizes and what is wrong with them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import Any

from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.format.manifest import MANIFEST, Manifest, read_manifest
from dist_asgd.checkpoint.retention import Directory, newest_by_step
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.cli.arguments import add_run_arguments
from dist_asgd.cli.output import format_bytes, format_duration, printable, table, write
from dist_asgd.cli.urls import bytes_in, open_run

HELP = "the checkpoints of a run: steps, sizes, age, number of ranks"
COLUMNS = ("step", "size", "tensors", "ranks", "age", "state", "directory")
add_arguments = add_run_arguments


def run(arguments: argparse.Namespace) -> int:
    """Prints a row for each directory of a checkpoint. Returns 1 where one is damaged, else 0."""
    storage, sizes, directories = open_run(arguments)
    newest = newest_by_step(directories).values()
    manifests = _read_manifests(storage, directories, sizes)
    rows = [_directory_report(storage, directory, sizes, manifests, directory in newest) for directory in directories]
    if arguments.json:
        write({"url": storage.url, "checkpoints": rows})
    else:
        write(table([list(COLUMNS), *map(_table_row, rows)], left_aligned=(5, 6)))
    return 1 if any(row["state"] == "damaged" for row in rows) else 0


def _read_manifests(
    storage: Storage, directories: list[Directory], sizes: Mapping[str, int]
) -> dict[str, Manifest | str]:
    """Returns the manifest of each committed directory, by name; in place of a damaged checkpoint's, the problem."""
    names = [directory.name for directory in directories if directory.is_committed]
    manifests: dict[str, Manifest | str] = {}
    for index, data in storage.read_ranges([(f"{name}/{MANIFEST}", 0, sizes[f"{name}/{MANIFEST}"]) for name in names]):
        try:
            manifest = read_manifest(data)
        except CheckpointError as error:
            manifests[names[index]] = str(error)
            continue
        wrong = [name for name, file in manifest.files.items() if sizes.get(f"{names[index]}/{name}") != file.size]
        manifests[names[index]] = f"{wrong[0]} is missing, or of another size" if wrong else manifest
    return manifests


def _directory_report(
    storage: Storage,
    directory: Directory,
    sizes: Mapping[str, int],
    manifests: Mapping[str, Manifest | str],
    is_newest: bool,
) -> dict[str, Any]:
    """Returns what ``--json`` prints of one directory; ``is_newest``: no later attempt at its step was committed."""
    manifest = manifests.get(directory.name)
    report: dict[str, Any] = {"step": directory.step, "attempt": directory.attempt, "directory": directory.name}
    report["bytes"] = bytes_in(directory.name, sizes)
    if isinstance(manifest, Manifest):
        report |= {"tensors": len(manifest.tensors), "world_size": manifest.world_size, "created": manifest.created}
        return report | {"state": "committed" if is_newest else "replaced", "damage": None}
    report |= {"tensors": None, "world_size": None, "created": storage.modified(directory.name)}
    return report | {"state": "incomplete" if manifest is None else "damaged", "damage": manifest}


def _table_row(report: Mapping[str, Any]) -> list[str]:
    age = "" if report["created"] is None else format_duration(time.time() - report["created"])
    tensors, ranks = ("" if report[name] is None else f"{report[name]:,}" for name in ("tensors", "world_size"))
    state = report["state"] if report["damage"] is None else f"{report['state']}: {printable(report['damage'])}"
    return [str(report["step"]), format_bytes(report["bytes"]), tensors, ranks, age, state, report["directory"]]
