"""``dist-asgd verify``: reads every byte of a checkpoint, and tells all that is wrong."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

from dist_asgd.checkpoint.format.manifest import NAME
from dist_asgd.checkpoint.loading.verify import verify_checkpoint, verify_stock_checkpoint
from dist_asgd.cli.output import printable, progress_bar, readable, write
from dist_asgd.cli.places import checkpoint_at, options_of


def run(arguments: argparse.Namespace) -> int:
    options = options_of(arguments.storage_option, arguments.storage_options)
    place = checkpoint_at(arguments.url, options, arguments.step)
    sizes = place.sizes()
    is_ours = NAME in sizes
    with progress_bar("verified", hidden=arguments.json) as progress:
        faults = (verify_checkpoint if is_ours else verify_stock_checkpoint)(place.storage, place.directory, progress)
    kind = "dist_asgd" if is_ours else "torch.distributed.checkpoint"
    if arguments.json:
        faulty = [asdict(fault) for fault in faults]
        write({"url": place.url, "format": kind, "bytes": sum(sizes.values()), "faults": faulty})
        return 1 if faults else 0
    by = (
        "" if is_ours else f", a checkpoint of torch.distributed.checkpoint without {NAME}, by the CRC-32s in its items"
    )
    if not faults:
        write(
            f"{printable(place.url)}: {readable(sum(sizes.values()))} in {len(sizes)} files are as they were saved{by}"
        )
        return 0
    lines = [f"{fault.file}: {f'{fault.key!r}: ' if fault.key else ''}{fault.text}" for fault in faults]
    write("\n".join(map(printable, lines)))
    print(f"dist-asgd: {printable(place.url)}{by}, is damaged: {len(faults)} faults", file=sys.stderr)
    return 1
