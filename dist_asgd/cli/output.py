"""What commands print: nothing that a checkpoint says can move the cursor of the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol


class OutputError(OSError):
    """Standard output takes no more."""


class ReportProgress(Protocol):
    """Told of work that was done."""

    def __call__(self, done: int, total: int) -> None:
        """``done`` more bytes of ``total`` in all."""


def write(content: Any) -> None:
    """Lines of text, or else anything as JSON, to standard output. Raises OutputError."""
    text = content if isinstance(content, str) else json.dumps(content, indent=2)
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        raise OutputError(error.errno, str(error)) from error


def printable(text: str) -> str:
    """One line: control characters, also those that change the direction of writing, as escapes."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text
    )


def table(rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    """Columns as wide as their widest cell; those numbered in ``left`` are set flush left, all others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        lines.append("  ".join(cell.ljust(width) if at in left else cell.rjust(width) for at, (cell, width) in cells))
    return "\n".join(line.rstrip() for line in lines)


def readable(count: int) -> str:
    """A number of bytes."""
    if count < 1024:
        return f"{count} B"
    power = min((count.bit_length() - 1) // 10, 4)
    return f"{count / 1024**power:.2f} {('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"


def ago(seconds: float) -> str:
    """A duration in its largest unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


@contextmanager
def progress_bar(title: str, hidden: bool) -> Iterator[ReportProgress]:
    """A bar on standard error, if that is a terminal and tqdm is installed."""
    bar = None if hidden or not sys.stderr.isatty() else _bar(title)

    def advance(done: int, total: int) -> None:
        if bar is not None:
            bar.total = total
            bar.update(done)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.close()


def _bar(title: str) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(desc=title, unit="B", unit_scale=True, unit_divisor=1024, leave=False, file=sys.stderr)
