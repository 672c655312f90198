"""Entry point of the ``dist-asgd`` command: the parser, the exit statuses, and the handling of errors."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from dist_asgd import __version__
from dist_asgd.checkpoint.errors import CheckpointError, NoCheckpoint, NotCommitted
from dist_asgd.cli.arguments import Parser
from dist_asgd.cli.output import OutputError, flush, note, open_closed_streams
from dist_asgd.cli.urls import NotFound, UsageError

COMMANDS = ("ls", "show", "verify", "export", "merge", "gc", "watch", "plan")  # modules of cli/, in the order of --help
EXIT_STATUSES = "Exit status: 0 done, 1 damaged or failed, 2 wrong arguments, 3 no checkpoint there."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status, which ``EXIT_STATUSES`` explains; 130 after Ctrl-C.

    An error is printed as one line on standard error. A closed standard output changes no status.

    Args:
        argv: arguments after the program's name; None for those of the process.

    Raises:
        SystemExit: with status 2 where argparse rejects the arguments, with 0 after ``--help`` or ``--version``.
    """
    open_closed_streams()
    arguments = _parse(argv)
    try:
        status: int = arguments.run(arguments)
        return status
    except OutputError as error:
        return _failed(f"cannot write the output: {error}", 1)
    except UsageError as error:
        return _failed(error, 2)
    except (NotFound, NoCheckpoint, NotCommitted) as error:
        return _failed(error, 3)
    except (CheckpointError, OSError) as error:
        return _failed(error, 1)
    except KeyboardInterrupt:
        return _failed("interrupted", 130)


def _failed(error: object, status: int) -> int:
    note(str(error))
    return status


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the parsed arguments, among them the command's function ``run``."""
    try:
        return _parser().parse_args(argv)
    except SystemExit:
        flush()  # what --help and --version print
        raise


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="dist-asgd", description="Sharded averaged SGD for torch.distributed.", epilog=EXIT_STATUSES)
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        command = importlib.import_module(f"dist_asgd.cli.{name}")
        subparser = subparsers.add_parser(name, help=command.HELP, description=command.HELP, epilog=EXIT_STATUSES)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser
