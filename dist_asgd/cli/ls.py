"""``dist-asgd ls``: lists the checkpoints of a run, or one checkpoint, with sizes and what is wrong with them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import Any

from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.format.manifest import MANIFEST, MAX_MANIFEST, STOCK, check_size, in_directory, read_manifest
from dist_asgd.checkpoint.loading.ranges import read_record
from dist_asgd.checkpoint.loading.verify import Fault, verify_checkpoint, verify_stock_checkpoint
from dist_asgd.checkpoint.retention import expected_files, wrong_file
from dist_asgd.checkpoint.run.directories import Directory
from dist_asgd.checkpoint.run.listing import Run
from dist_asgd.checkpoint.stock.metadata import read_stock_metadata
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.cli.arguments import add_run_arguments
from dist_asgd.cli.output import ReportProgress, format_bytes, format_duration, printable, progress_bar, table, write
from dist_asgd.cli.urls import bytes_in, open_run, open_storage, storage_options

HELP = "the checkpoints of a run, or one checkpoint: steps, sizes, age, number of ranks"
COLUMNS = ("step", "size", "tensors", "ranks", "age", "state", "directory")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the URL, and whether bytes are read."""
    add_run_arguments(parser)
    parser.add_argument("--verify", action="store_true", help="read every byte, and tell which checkpoints are damaged")


def run(arguments: argparse.Namespace) -> int:
    """Prints a row for each directory of a checkpoint. Returns 1 where one is damaged, else 0."""
    storage = open_storage(arguments.url, storage_options(arguments))
    top = storage.list()
    with progress_bar("verified", hidden=arguments.json or not arguments.verify) as progress:
        report_progress = progress if arguments.verify else None
        if MANIFEST in top or STOCK in top:
            rows = [_single_report(storage, MANIFEST in top, report_progress)]
        else:
            rows = _run_reports(open_run(storage), report_progress)
    if arguments.json:
        write({"url": storage.url, "checkpoints": rows})
    else:
        write(table([list(COLUMNS), *map(_table_row, rows)], left_aligned=(5, 6)))
    return 1 if any(row["damage"] is not None for row in rows) else 0


def _run_reports(found: Run, progress: ReportProgress | None) -> list[dict[str, Any]]:
    """Returns what ``--json`` prints of each directory of a run; reads all bytes if ``progress`` is given."""
    paths = {
        directory.name: f"{directory.name}/{MANIFEST}" for directory in found.directories if directory.is_committed
    }
    names = [name for name, path in paths.items() if 0 < found.sizes[path] <= MAX_MANIFEST]  # 0: a FIFO, too
    ranges = [(paths[name], 0, found.sizes[paths[name]]) for name in names]
    data = {names[index]: data for index, data in found.storage.read_ranges(ranges)}
    live = {directory.name for directory in found.live().values()}
    rows = []
    for directory in found.directories:
        row = {"step": directory.step, "attempt": directory.attempt, "directory": directory.name}
        row |= {"bytes": bytes_in(directory.name, found.sizes)}
        if not directory.is_committed:
            created = found.storage.modified(directory.name)
            rows.append({**row, **_unknown(created), "state": "incomplete", "damage": None})
            continue
        facts = _manifest_facts(found.storage, directory.name, data.get(directory.name), found.sizes)
        if progress is not None and facts["damage"] is None:
            facts["damage"] = _first(verify_checkpoint(found.storage, directory.name, progress))
        rows.append({**row, **facts, "state": _state(directory, directory.name in live, facts["damage"])})
    return rows


def _single_report(storage: Storage, has_manifest: bool, progress: ReportProgress | None) -> dict[str, Any]:
    """Returns what ``--json`` prints of one checkpoint: of this library, or of ``torch.distributed.checkpoint``."""
    sizes = storage.sizes()
    facts: dict[str, Any] = {"step": None, "attempt": None, "directory": "", "bytes": sum(sizes.values())}
    if has_manifest:
        data = storage.read(MANIFEST) if sizes[MANIFEST] <= MAX_MANIFEST else None
        facts |= _manifest_facts(storage, "", data, sizes)
        if data is not None and facts["damage"] is None:
            facts["step"] = read_manifest(data).step
    else:
        facts |= _stock_facts(storage)
    if progress is not None and facts["damage"] is None:
        verify = verify_checkpoint if has_manifest else verify_stock_checkpoint
        facts["damage"] = _first(verify(storage, "", progress))
    sound = "committed" if has_manifest else "torch.distributed.checkpoint"
    return {**facts, "state": sound if facts["damage"] is None else "damaged"}


def _manifest_facts(storage: Storage, directory: str, data: bytes | None, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Returns what the manifest tells of a checkpoint, and what is wrong with it or with the sizes of its files.

    Args:
        data: the bytes of the manifest; None where it is too large to be one.
    """
    try:
        check_size(sizes[in_directory(directory, MANIFEST)])
        manifest = read_manifest(data or b"")
    except CheckpointError as error:
        return {**_unknown(storage.modified(directory)), "damage": str(error)}
    facts = {"tensors": len(manifest.tensors), "world_size": manifest.world_size, "created": manifest.created}
    return {**facts, "damage": wrong_file(expected_files(manifest), sizes, directory)}


def _stock_facts(storage: Storage) -> dict[str, Any]:
    """Returns what ``.metadata`` tells of a checkpoint of ``torch.distributed.checkpoint``.

    Raises ``NotCommitted`` if it belongs to a save of this library that never finished.
    """
    found = read_stock_metadata(read_record(storage, "", STOCK, storage.sizes()), committed=False)
    return {**_unknown(storage.modified("")), "tensors": len(found.tensors), "damage": None}


def _unknown(created: float | None) -> dict[str, Any]:
    return {"tensors": None, "world_size": None, "created": created}


def _first(faults: list[Fault]) -> str | None:
    """Returns the first fault of a checkpoint and how many there are, or None for a sound one."""
    if not faults:
        return None
    text = f"{faults[0].file}: {faults[0].text}"
    return text if len(faults) == 1 else f"{text}; {len(faults)} faults"


def _state(directory: Directory, is_live: bool, damage: str | None) -> str:
    if damage is not None:
        return "damaged"
    if directory.is_abandoned:
        return "abandoned"
    return "committed" if is_live else "replaced"


def _table_row(report: Mapping[str, Any]) -> list[str]:
    age = "" if report["created"] is None else format_duration(time.time() - report["created"])
    tensors, ranks = ("" if report[name] is None else f"{report[name]:,}" for name in ("tensors", "world_size"))
    state = report["state"] if report["damage"] is None else f"{report['state']}: {printable(report['damage'])}"
    step = "" if report["step"] is None else str(report["step"])
    return [step, format_bytes(report["bytes"]), tensors, ranks, age, state, report["directory"]]
