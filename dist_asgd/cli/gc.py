"""``dist-asgd gc``: deletes checkpoints that are not kept, and what failed saves have left."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from dist_asgd.checkpoint.retention import RetentionPolicy, delete_outdated, directories, outdated
from dist_asgd.cli.output import readable, table, write
from dist_asgd.cli.places import NotFound, UsageError, opened, options_of


def run(arguments: argparse.Namespace) -> int:
    if arguments.keep_last is None and (arguments.keep_every is not None or arguments.pin):
        raise UsageError("--keep-every and --pin keep checkpoints besides those of --keep-last: give that, too")
    storage = opened(arguments.url, options_of(arguments.storage_option, arguments.storage_options))
    sizes = storage.sizes()
    if not directories(storage):
        raise NotFound(f"{storage.url} has no checkpoints of a run: no directories step-..., that Checkpointer makes")
    policy = RetentionPolicy(arguments.keep_last, arguments.keep_every, frozenset(arguments.pin))
    if arguments.dry_run:
        names = [directory.name for directory in outdated(storage, policy, arguments.older_than)]
    else:
        names = delete_outdated(storage, policy, arguments.older_than)
    freed = {name: _bytes_below(name, sizes) for name in names}
    if arguments.json:
        write({"url": storage.url, "dry_run": arguments.dry_run, "deleted": freed, "bytes": sum(freed.values())})
        return 0
    verb = "would delete" if arguments.dry_run else "deleted"
    rows = [[verb, name, readable(size)] for name, size in freed.items()]
    write(
        "\n".join(
            [
                *([table(rows, left=(0, 1))] if rows else []),
                f"{verb} {len(rows)} directories, {readable(sum(freed.values()))}",
            ]
        )
    )
    return 0


def _bytes_below(name: str, sizes: Mapping[str, int]) -> int:
    return sum(size for path, size in sizes.items() if path.startswith(f"{name}/"))
