"""Sections of docs/guide/frameworks.md as programs."""

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent.parent / "docs" / "guide" / "frameworks.md"
MARK = "# +"  # at the end of a line that a user adds


def program_of(title: str) -> str:
    """Returns the Python blocks of a section."""
    section = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith(f"{title}\n")]
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


def added_lines(title: str) -> list[str]:
    """Returns the lines of a section that a user adds to a training; each line with something of ours is marked."""
    lines = program_of(title).splitlines()
    unmarked = [line for line in lines if "dist_asgd" in line and not line.endswith(MARK)]
    assert not unmarked, f"lines of {title} that are not marked by {MARK}: {unmarked}"
    return [line for line in lines if line.endswith(MARK)]


def run_section(title: str) -> dict[str, Any]:
    """Runs a section; returns its names."""
    names: dict[str, Any] = {"__name__": "guide"}
    exec(compile(program_of(title), f"{PAGE.name}: {title}", "exec"), names)
    return names
