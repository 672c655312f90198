"""Writes the Python blocks of README.md and docs/guide as modules, one for each page, for mypy to check.

    python launch/examples.py .venv/pages

Blocks of a page go on from one another. A block of another kind, such as "python gpu", is a page of its own. Lines keep
their numbers, so that an error of mypy names the line of the page.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCED = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def modules_of(page: Path) -> dict[str, str]:
    """Returns the modules of a page by name."""
    text, modules = page.read_text(), dict[str, str]()
    for found in FENCED.finditer(text):
        if found[1].startswith("python"):
            name = f"{page.stem}_{found[1]}".lower().replace(" ", "_")
            module = modules.get(name, "")
            gap = text[: found.start(2)].count("\n") - module.count("\n")
            modules[name] = module + "\n" * gap + found[2]
    return modules


def main(folder: Path) -> None:
    """Writes all modules into a folder, which becomes a package."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.py"):
        old.unlink()
    modules = {"__init__": ""}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))):
        modules |= modules_of(page)
    for name, module in modules.items():
        (folder / f"{name}.py").write_text(module)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
