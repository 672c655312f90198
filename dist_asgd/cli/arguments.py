"""Command-line arguments that several commands declare, and the types of their values."""

from __future__ import annotations

import argparse
import json
from typing import Any, NoReturn

from dist_asgd.checkpoint.storage.url import masked


class Parser(argparse.ArgumentParser):
    """A parser whose errors quote no credentials: what it quotes may be a URL in the wrong place."""

    def error(self, message: str) -> NoReturn:
        """Prints the usage and the message, and exits with status 2."""
        super().error(masked(message))


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares ``URL`` (the directory of a run), ``--json`` and the storage options."""
    parser.add_argument("url", metavar="URL", help="a path or fsspec URL: the directory of a run")
    add_output_and_storage_options(parser)


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares ``URL`` (a checkpoint, or the directory of a run), ``--step``, ``--json`` and the storage options."""
    parser.add_argument("url", metavar="URL", help="a path or fsspec URL: of one checkpoint, or the directory of a run")
    parser.add_argument("--step", type=non_negative, metavar="N", help="of the run (default: the newest)")
    add_output_and_storage_options(parser)


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Declares ``--json``, which switches a command's output from text to JSON."""
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")


def add_average_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """Declares ``average``: False without the option, True for the first average, or the name of one."""
    text = f"{what}; of several the first, or that of the NAME"
    parser.add_argument("--average", nargs="?", default=False, const=True, metavar="NAME", help=text)


def positive(text: str) -> int:
    """Parses a whole number of at least 1. Raises ``argparse.ArgumentTypeError``."""
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def non_negative(text: str) -> int:
    """Parses a whole number of at least 0. Raises ``argparse.ArgumentTypeError``."""
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def add_output_and_storage_options(parser: argparse.ArgumentParser) -> None:
    """Declares ``--json`` and the storage options."""
    add_json_argument(parser)
    parser.add_argument(
        "--storage-option",
        type=_key_and_value,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="for fsspec, repeatable; the value as JSON, or a string where it is none",
    )
    parser.add_argument("--storage-options", metavar="FILE", help="JSON with such options: others see no command line")


def _key_and_value(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not key or not separator:
        raise argparse.ArgumentTypeError("expected KEY=VALUE")  # without the text, which may be a secret
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
