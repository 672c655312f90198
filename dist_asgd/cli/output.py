"""Output of commands: text, tables, JSON and progress bars.

Names and values of a checkpoint may come from anybody: ``printable`` keeps them from sending codes to the terminal.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, TextIO, TypeAlias


class OutputError(OSError):
    """Standard output cannot be written; ``__cause__`` is the error of the system."""


# Called after each part of long work with the bytes that it has done and all bytes together.
ReportProgress: TypeAlias = Callable[[int, int], None]


def open_closed_streams() -> None:
    """Opens the null device for standard output and standard error where the process was started without them.

    Python has None in their place then, and the system would give their numbers to the next files that are opened.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_WRONLY)
            os.dup2(descriptor, number)
            setattr(sys, name, open(number, "w", encoding="utf-8"))  # noqa: SIM115


def write(content: Any) -> None:
    """Prints a string as it is, and anything else as JSON, to standard output.

    A reader that went away, as after ``| head``, wants no more: the rest is dropped, and the command goes on. Raises
    ``OutputError`` for any other failure.
    """
    text = content if isinstance(content, str) else json.dumps(content, indent=2)
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        drop(sys.stdout)
    except OSError as error:
        drop(sys.stdout)
        raise OutputError(error.errno, str(error)) from error


def note(text: str) -> None:
    """Prints a line on standard error, where somebody reads it."""
    try:
        print(f"dist-asgd: {printable(text)}", file=sys.stderr, flush=True)
    except OSError:
        drop(sys.stderr)


def flush() -> None:
    """Writes out what is left in standard output and standard error; nothing where nobody reads it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            drop(stream)


def drop(stream: TextIO) -> None:
    """Lets a standard stream end in the null device: Python flushes it at exit, and would fail and report again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def printable(text: str) -> str:
    """Returns ``text`` as one line without control characters: each that cannot be printed becomes an escape.

    Line breaks, codes for terminals, surrogates and characters that change the direction of writing are among them.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text
    )


def table(rows: Sequence[Sequence[str]], left_aligned: Sequence[int] = ()) -> str:
    """Returns lines of columns, each as wide as its widest cell; two spaces stand between columns.

    Args:
        rows: at least one; all have the same number of cells.
        left_aligned: numbers of the columns that are aligned left, counted from 0; all others are aligned right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        padded = (cell.ljust(width) if at in left_aligned else cell.rjust(width) for at, (cell, width) in cells)
        lines.append("  ".join(padded))
    return "\n".join(line.rstrip() for line in lines)


def format_bytes(count: int) -> str:
    """Returns a number of bytes in the largest binary unit up to TiB, as ``1.50 GiB``."""
    if count < 1024:
        return f"{count} B"
    power = min((count.bit_length() - 1) // 10, 4)
    return f"{count / 1024**power:.2f} {('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"


def format_duration(seconds: float) -> str:
    """Returns a duration in its largest unit of days, hours, minutes and seconds, as ``3 h``; never below ``0 s``."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


@contextmanager
def progress_bar(title: str, hidden: bool) -> Iterator[ReportProgress]:
    """Shows a bar on standard error while the block runs, if that is a terminal and tqdm is installed."""
    if hidden or not sys.stderr.isatty() or find_spec("tqdm") is None:
        yield lambda done, total: None
        return
    from tqdm import tqdm

    with tqdm(desc=title, unit="B", unit_scale=True, unit_divisor=1024, leave=False, file=sys.stderr) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done)

        yield advance
