"""The scored table: twelve situations in which averages of weights went wrong, for this library and six others.

    pip install ema-pytorch diffusers lightning timm torchtitan
    python -m benchmarks.wounds

Every cell is run for real, in fresh processes: 2 ranks over gloo, and 1 where another number resumes. The situations
are functions of ``benchmarks/averaging_wounds/situations.py``, each beside what it holds to be right; each peer is used
as its documentation says (``benchmarks/averaging_wounds/peers``). A verdict is computed:

- right: the average is that of the stored iterates in fp64, by the peer's own rule, or has the property in question;
- error: an exception, whose text is given; hangs: no end within ``--timeout``;
- silently wrong: another result, and no error;
- not possible: the peer has no API for it; not run: not on this machine.

Where a peer has several ways, the cell is right if one of them is; else it is what the documented way gives. Of what is
not installed the column says so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.averaging_wounds.cell import run_cell
from benchmarks.averaging_wounds.oracle import RIGHT
from benchmarks.averaging_wounds.peers import PEERS, load_peer
from benchmarks.averaging_wounds.situations import SITUATIONS
from benchmarks.table import print_table, write_json_lines

NOT_INSTALLED = "not installed"


def main() -> None:
    options = _arguments()
    torch.set_num_threads(1)
    rows = []
    for peer in options.peers:
        rows += _column(peer, options.situations, options.timeout)
    print(f"\n{', '.join(_versions(options.peers))}\n")
    print_tables(rows, options.peers)
    write_json_lines(options.json, rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wounds", description=__doc__.splitlines()[0])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER")
    parser.add_argument("--situations", nargs="+", type=int, choices=SITUATIONS, default=list(SITUATIONS), metavar="N")
    parser.add_argument("--timeout", type=float, default=180.0, metavar="SECONDS", help="for each run of a cell")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("wounds.jsonl"), metavar="FILE")
    return parser.parse_args()


def _column(peer: str, situations: Sequence[int], timeout: float) -> list[dict[str, Any]]:
    """Runs the situations for one peer."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind = load_peer(peer)
    except ImportError as error:
        print(f"{peer}: {error}", flush=True)
        return [{"situation": n, "peer": peer, "verdict": NOT_INSTALLED, "note": str(error)} for n in situations]
    rows = []
    for number in situations:
        started = time.monotonic()
        finding = run_cell(number, kind, timeout)
        rows.append({"situation": number, "peer": peer, **asdict(finding)})
        taken = time.monotonic() - started
        print(f"{peer}, {number}, {taken:.0f} s: {finding.verdict}: {finding.note}", flush=True)
    return rows


def _versions(peers: Sequence[str]) -> list[str]:
    found = []
    for package in dict.fromkeys(["torch", *(PEERS[peer][1] for peer in peers)]):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    return found


def print_tables(rows: Sequence[dict[str, Any]], peers: Sequence[str]) -> None:
    """Prints the verdicts, a column for each peer, and under them the reasons of each."""
    verdicts = {(row["situation"], row["peer"]): row["verdict"] for row in rows}
    numbers = list(dict.fromkeys(row["situation"] for row in rows))
    lines = [
        {"number": number, "situation": SITUATIONS[number].title} | {peer: verdicts[number, peer] for peer in peers}
        for number in numbers
    ]
    right = {peer: f"{sum(verdicts[number, peer] == RIGHT for number in numbers)} of {len(numbers)}" for peer in peers}
    lines.append({"number": None, "situation": "right"} | right)
    print_table(lines, {"number": "#", "situation": "situation"} | {peer: peer for peer in peers})
    for number in numbers:
        print(f"\n{number}. {SITUATIONS[number].title}\n")
        for row in rows:
            if row["situation"] == number:
                print(f"- {row['peer']}: {row['verdict']}. {row['note']}")


if __name__ == "__main__":
    main()
