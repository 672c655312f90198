"""``dist-asgd gc``: deletes the checkpoints of a run that are not kept, and the remains of failed saves."""

from __future__ import annotations

import argparse

from dist_asgd.checkpoint.retention import GRACE, RetentionPolicy, delete_outdated, outdated
from dist_asgd.cli.arguments import add_run_arguments, non_negative, positive
from dist_asgd.cli.output import format_bytes, table, write
from dist_asgd.cli.urls import UsageError, bytes_in, open_run, open_storage, storage_options

HELP = "delete replaced checkpoints, what failed saves left, and all checkpoints that are abandoned or not kept"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the run and which of its checkpoints are kept."""
    add_run_arguments(parser)
    parser.add_argument("--keep-last", type=positive, metavar="N", help="keep the newest N (default: all)")
    parser.add_argument("--keep-every", type=positive, metavar="M", help="and those whose step is a multiple of M")
    parser.add_argument(
        "--pin", type=non_negative, action="append", default=[], metavar="STEP", help="and this; repeatable"
    )
    parser.add_argument(
        "--older-than",
        type=non_negative,
        default=int(GRACE),
        metavar="SECONDS",
        help="what was not committed goes when it was not written to for so long (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="delete nothing, tell what would be deleted")


def run(arguments: argparse.Namespace) -> int:
    """Deletes, or with ``--dry-run`` lists, the directories that are not kept. Prints each and its bytes. Returns 0."""
    if arguments.keep_last is None and (arguments.keep_every is not None or arguments.pin):
        raise UsageError("--keep-every and --pin keep checkpoints besides those of --keep-last: give that, too")
    storage = open_storage(arguments.url, storage_options(arguments))
    run = open_run(storage)
    policy = RetentionPolicy(arguments.keep_last, arguments.keep_every, frozenset(arguments.pin))
    if arguments.dry_run:
        names = [directory.name for directory in outdated(run, policy, arguments.older_than)]
    else:
        names = delete_outdated(storage, policy, arguments.older_than)
    freed = {name: bytes_in(name, run.sizes) for name in names}
    if arguments.json:
        write({"url": storage.url, "dry_run": arguments.dry_run, "deleted": freed, "bytes": sum(freed.values())})
        return 0
    verb = "would delete" if arguments.dry_run else "deleted"
    rows = [[verb, name, format_bytes(size)] for name, size in freed.items()]
    total = f"{verb} {len(rows)} directories, {format_bytes(sum(freed.values()))}"
    write(f"{table(rows, left_aligned=(0, 1))}\n{total}" if rows else total)
    return 0
