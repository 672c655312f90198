"""The ``dist-asgd`` command: its arguments, and what its exit statuses mean."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from dist_asgd import __version__
from dist_asgd.checkpoint.errors import CheckpointError, NotCommitted
from dist_asgd.checkpoint.retention import GRACE
from dist_asgd.cli import export, gc, ls, plan, show, verify
from dist_asgd.cli.output import OutputError, printable
from dist_asgd.cli.places import NotFound, UsageError

EXIT_STATUSES = "Exit status: 0 done, 1 damaged or failed, 2 wrong arguments, 3 no checkpoint there."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit status: 0, or as in ``EXIT_STATUSES``.

    Errors are one line on standard error. Arguments that cannot be parsed exit with 2, as argparse does.
    """
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        return status
    except OutputError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries once more when it exits
        # Of `| head` nobody wants to hear.
        return 1 if isinstance(error.__cause__, BrokenPipeError) else _failed(f"cannot write the output: {error}", 1)
    except UsageError as error:
        return _failed(error, 2)
    except (NotFound, NotCommitted) as error:
        return _failed(error, 3)
    except (CheckpointError, OSError) as error:
        return _failed(error, 1)
    except KeyboardInterrupt:
        return _failed("interrupted", 130)


def _failed(error: object, status: int) -> int:
    print(f"dist-asgd: {printable(str(error))}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dist-asgd", description="Sharded averaged SGD for torch.distributed.", epilog=EXIT_STATUSES
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_ls(commands)
    _add_show(commands)
    _add_verify(commands)
    _add_export(commands)
    _add_gc(commands)
    _add_plan(commands)
    return parser


def _add_ls(commands: Any) -> None:
    _add(commands, "ls", ls.run, "the checkpoints of a run: steps, sizes, age, number of ranks", RUN)


def _add_show(commands: Any) -> None:
    parser = _add(commands, "show", show.run, "what is in a checkpoint: tensors, where they are stored, values", EITHER)
    parser.add_argument("--keys", metavar="GLOB", help="only entries with such keys, as 'model.*'")


def _add_verify(commands: Any) -> None:
    text = "read every byte of a checkpoint and tell all that is wrong; stock DCP checkpoints, too"
    _add(commands, "verify", verify.run, text, EITHER)


def _add_export(commands: Any) -> None:
    text = (
        "write tensors of a checkpoint to one file, for torch.load or safetensors, or to a directory for transformers"
    )
    parser = _add(commands, "export", export.run, text, EITHER)
    parser.add_argument(
        "out",
        metavar="OUT",
        help="path or URL of the file; replaced if it is there. Or, with a / at its end, of a directory, which gets "
        "the layout of Hugging Face. Storage options are for URL, and for OUT where both are on one kind of store or "
        "URL is a path",
    )
    parser.add_argument("--format", choices=[*export.FORMATS, export.DIRECTORY], help="default: by OUT's suffix")
    parser.add_argument(
        "--average",
        nargs="?",
        default=False,
        const=True,
        metavar="NAME",
        help="optimizers' averages in place of parameters; of several the first, or that of the NAME",
    )
    parser.add_argument(
        "--max-shard-size",
        type=_bytes,
        metavar="SIZE",
        help="of tensors in one file of a directory: bytes, or as 500MB, 2GiB (default: 5GB)",
    )
    parser.add_argument("--config", metavar="FILE", help="becomes config.json of a directory: checkpoints have none")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--entry", metavar="NAME", help="of what was saved; keys lose this prefix (default: model)")
    which.add_argument("--keys", metavar="GLOB", help="tensors with such keys, which stay whole, as 'model.layers.*'")


def _add_gc(commands: Any) -> None:
    text = "delete replaced checkpoints, what failed saves left, and all checkpoints that are not kept"
    parser = _add(commands, "gc", gc.run, text, RUN)
    parser.add_argument("--keep-last", type=_positive, metavar="N", help="keep the newest N (default: all)")
    parser.add_argument("--keep-every", type=_positive, metavar="M", help="and those whose step is a multiple of M")
    parser.add_argument("--pin", type=_whole, action="append", default=[], metavar="STEP", help="and this; repeatable")
    parser.add_argument(
        "--older-than",
        type=_whole,
        default=int(GRACE),
        metavar="SECONDS",
        help="what was not committed goes when it was not written to for so long (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="delete nothing, tell what would be deleted")


def _add_plan(commands: Any) -> None:
    parser = commands.add_parser(
        "plan", help="how replicated parameters are cut over ranks, and what memory that takes"
    )
    parser.add_argument(
        "shapes", nargs="+", type=_shape, metavar="SHAPE", help="of a parameter, as 1000x1000; in order"
    )
    parser.add_argument("--world-size", required=True, type=_positive, metavar="N", help="number of ranks")
    parser.add_argument("--dtype", default="float32", choices=plan.ITEM_BYTES, help="of parameters (default: float32)")
    parser.add_argument(
        "--bucket-bytes", default=plan.BUCKET_BYTES, type=_positive, metavar="N", help="default: 25 MiB"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    parser.set_defaults(run=plan.run)


UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
RUN = "a path or fsspec URL: the directory of a run"
EITHER = "a path or fsspec URL: of one checkpoint, or the directory of a run"


def _add(commands: Any, name: str, run: Any, text: str, url: str) -> argparse.ArgumentParser:
    """A command that is about the checkpoints at a URL."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, epilog=EXIT_STATUSES)
    parser.add_argument("url", metavar="URL", help=url)
    if url == EITHER:
        parser.add_argument("--step", type=_whole, metavar="N", help="of the run (default: the newest)")
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    parser.add_argument(
        "--storage-option",
        type=_option,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="for fsspec, repeatable; the value as JSON, or a string where it is none",
    )
    parser.add_argument("--storage-options", metavar="FILE", help="JSON with such options: others see no command line")
    parser.set_defaults(run=run)
    return parser


def _option(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not name or not separator:
        raise argparse.ArgumentTypeError("expected KEY=VALUE")  # without the text, which may be a secret
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    shape = tuple(int(size) if size.isascii() and size.isdecimal() else 0 for size in sizes)
    if min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape: write positive sizes joined by x, as 1000x1000 or 10")
    return shape


def _bytes(text: str) -> int:
    found = re.fullmatch("([0-9]{1,18})([KMGT]i?B|)", text)
    size = int(found[1]) * UNITS[found[2]] if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 5GB, 500MB, 2GiB, or a number of bytes")
    return size


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)
