"""``dist-asgd verify``: reads every byte of a checkpoint and reports everything that is wrong."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from dist_asgd.checkpoint.format.manifest import MANIFEST
from dist_asgd.checkpoint.loading.verify import verify_checkpoint, verify_stock_checkpoint
from dist_asgd.cli.arguments import add_checkpoint_arguments
from dist_asgd.cli.output import format_bytes, note, printable, progress_bar, write
from dist_asgd.cli.urls import find_checkpoint, storage_options

HELP = "read every byte of a checkpoint and tell all that is wrong; stock DCP checkpoints, too"
add_arguments = add_checkpoint_arguments


def run(arguments: argparse.Namespace) -> int:
    """Verifies a checkpoint of dist_asgd or of ``torch.distributed.checkpoint``. Returns 1 if it is damaged, else 0."""
    checkpoint = find_checkpoint(arguments.url, storage_options(arguments), arguments.step)
    sizes = checkpoint.sizes()
    has_manifest = MANIFEST in sizes
    verify = verify_checkpoint if has_manifest else verify_stock_checkpoint
    with progress_bar("verified", hidden=arguments.json) as progress:
        faults = verify(checkpoint.storage, checkpoint.directory, progress)
    kind = "dist_asgd" if has_manifest else "torch.distributed.checkpoint"
    url, size = printable(checkpoint.url), sum(sizes.values())
    if arguments.json:
        faulty = [asdict(fault) for fault in faults]
        write({"url": checkpoint.url, "format": kind, "bytes": size, "faults": faulty})
        return 1 if faults else 0
    basis = "" if has_manifest else f", a checkpoint of {kind} without {MANIFEST}, by the CRC-32s in its items"
    if not faults:
        write(f"{url}: {format_bytes(size)} in {len(sizes)} files are as they were saved{basis}")
        return 0
    lines = [f"{fault.file}: {f'{fault.key!r}: ' if fault.key else ''}{fault.text}" for fault in faults]
    write("\n".join(map(printable, lines)))
    note(f"{url}{basis}, is damaged: {len(faults)} faults")
    return 1
