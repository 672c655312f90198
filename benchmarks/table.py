"""Print rows as a table, and write them as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def print_table(rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """A Markdown table: ``columns`` maps a row's key to its heading; numbers stand right, None is a dash."""
    cells = [list(columns.values())] + [[_cell(row[key]) for key in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    right = [all(not isinstance(row[key], str) for row in rows) for key in columns]
    rule = ["-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)]
    for line in [cells[0], rule, *cells[1:]]:
        fitted = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True))
        print("| " + " | ".join(fitted) + " |")


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def write_json_lines(path: Path, rows: Sequence[Row]) -> None:
    """One JSON object per row, replacing the file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"\n{len(rows)} rows written to {path}")
