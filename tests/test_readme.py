"""README.md: its examples run as written, its figures looked up in benchmarks/results, its links and names followed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import dist_asgd
from tests.support.ranks import run_alone, run_ranks

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "launch" / "README.md"]
DOCUMENTS += [*sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "benchmarks").rglob("*.md"))]
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_first_screen(ranks, tmp_path, capfd):
    """One process, and two ranks of torchrun."""
    train, _ = EXAMPLES
    if ranks == 1:
        run_alone(exec, train, {})
        printed = capfd.readouterr().out
    else:
        (tmp_path / "train.py").write_text(train)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    found = re.findall(r"error of the last iterate ([\d.]+), of the average ([\d.]+)", printed)
    assert len(found) == ranks
    assert all(float(averaged) < float(raw) for raw, averaged in found)
    assert "\n" + re.search(r"^\+(opt = .*)$", README, re.MULTILINE)[1] in train  # the changed line is the example's


def beside_adamw(rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 1))
    names = {"torch": torch, "model": fully_shard(model) if dist.is_initialized() else model}
    exec(EXAMPLES[1], names)
    x = names["x"]
    return (model(x) - x.mean(1, keepdim=True)).square().mean().item(), names["averaged"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_second_example(ranks):
    """One process, and two ranks under FSDP2."""
    found = [run_alone(beside_adamw, 0)] if ranks == 1 else run_ranks(ranks, beside_adamw)
    assert all(averaged < raw for raw, averaged in found)


def test_the_promises_name_their_tests():
    promises = re.findall(r"^\| \*\*.*\| (.*) \|$", README, re.MULTILINE)
    assert len(promises) == 5
    assert all(re.findall(r"`(tests/\w+/test_\w+\.py)`", shown) for shown in promises)


def test_the_numbers_are_those_of_the_results():
    """Each row of the table names a file of results; every figure of the row stands in one line of a table there."""
    table = README.partition("## Three numbers")[2].partition("![")[0]
    rows = re.findall(r"^\| ([^|]*\]\(([\w/.-]+)\)\)) \|(.*)\|$", table, re.MULTILINE)
    assert len(rows) == 3
    for what, file, figures in rows[:2]:
        numbers = re.findall(r"\d+\.\d\d", figures)
        assert len(numbers) >= 4
        assert all(re.search(rf"\| +{re.escape(number)} ", (ROOT / file).read_text()) for number in numbers), what
    faults = (ROOT / rows[2][1]).read_text()
    killed = re.findall(r"^\| all +\| +\| +150 \| (.*) \|$", faults, re.MULTILINE)
    # The last five columns: mixtures, stale, errors, silent, hangs.
    assert [[cell.strip() for cell in row.split("|")][-5:] for row in killed] == [["0"] * 5] * 4
    assert re.search(r"^\| all +\| +\| +1000 \| +1000 \|", faults, re.MULTILINE)


@each_document
def test_links_lead_somewhere(document):
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, heading = link.partition("#")
        if path.startswith("http"):
            continue
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{document.name}: {link}"
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if heading else []
        slugs = [re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings]
        assert not heading or heading in slugs, f"{document.name}: {link}"


@each_document
def test_files_that_are_named_are_there(document):
    """Paths are below the repository or below dist_asgd/; a name without a folder belongs to any file."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    folders = ("dist_asgd", "tests", "launch", "benchmarks")
    known = {path.name for folder in folders for path in (ROOT / folder).rglob("*")}
    for name in re.findall(r"`([\w/.-]+\.(?:py|c|sh|md|toml))`", text):
        if "/" in name:
            assert any((base / name).exists() for base in (ROOT, ROOT / "dist_asgd", document.parent)), name
        else:
            assert name in known or (ROOT / name).exists() or name == "train.py", name


def test_every_public_name_is_documented():
    text = "".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs" / "guide").glob("*.md")])
    missing = [name for name in dist_asgd.__all__ if not name.startswith("__") and not re.search(rf"\b{name}\(", text)]
    assert not missing, f"neither README.md nor docs/guide shows {missing} in use"
