"""What a run has measured: metrics.jsonl, the plot of its curves, and a table.

    python launch/report.py runs/demo        # prints the table of a run

One record is made at every evaluation. The file is small and is written as a whole each time, because object stores
cannot append.
"""

import contextlib
import io
import itertools
import json
import sys
from typing import Any

from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.checkpoint.storage.url import without_credentials

Record = dict[str, Any]


class Metrics:
    """The records of one run, kept in the directory or at the fsspec URL `out`.

    Args:
        resumed_step: the step that the run goes on from. Records up to it are kept, later ones are made again.
    """

    def __init__(self, out: str, resumed_step: int) -> None:
        self.out = out  # and no storage: every rank gets a pickled copy
        self.records = [record for record in read_metrics(out) if record["step"] <= resumed_step]

    def add(self, record: Record) -> None:
        """Keep one more record and write all of them."""
        self.records.append(record)
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        Storage.open(self.out).write("metrics.jsonl", [lines.encode()])

    def plot(self) -> str:
        """Draw loss.png; returns a sentence that says where it is, or why there is none."""
        picture = io.BytesIO()
        try:
            _draw(self.records).savefig(picture, format="png", dpi=150)
        except ImportError:
            return "matplotlib is not installed, so there is no loss.png: pip install 'dist-asgd[train]'"
        storage = Storage.open(self.out)
        storage.write("loss.png", [picture.getvalue()])
        return f"The curves: {storage.url}/loss.png"


def import_drivers(*urls: str) -> None:
    """Import what the URLs need, which takes a second, on all ranks at one time. `make_folders` has the errors."""
    for url in filter(None, urls):
        with contextlib.suppress(ValueError, OSError):
            Storage.open(url)


def make_folders(*urls: str) -> None:
    """Make the directories of a run, at its start: a typo ends it before there is something to lose."""
    for url in filter(None, urls):
        try:
            storage = Storage.open(url)
            storage.write("may-be-written", [b""])
            storage.remove("may-be-written")
        except (ValueError, OSError) as error:  # neither has credentials in its text
            raise SystemExit(f"{without_credentials(url)}: {error}") from None


def read_metrics(out: str) -> list[Record]:
    """The records in `out`; none where there is no file."""
    try:
        return [json.loads(line) for line in Storage.open(out).read("metrics.jsonl").splitlines()]
    except FileNotFoundError:
        return []


def table(records: list[Record]) -> str:
    """Tabulates the last record on each number of ranks, with its optimizer memory beside torch's."""
    last = {record["world_size"]: record for record in records}  # a later record replaces an earlier one
    head = "ranks    step   bits per byte: raw   uniform    recent   optimizer bytes per rank   torch's"
    row = (
        "{world_size:5}  {step:6}  {raw:19.4f}  {uniform:8.4f}  {recent:8.4f}  {optimizer_bytes:25,}  {torch_bytes:8,}"
    )
    return "\n".join([head, *(row.format_map(record) for record in last.values())])


def _draw(records: list[Record]) -> Any:
    """Draws bits per byte of the weights and of both averages over steps.

    A line stands where the number of ranks changed.
    """
    import matplotlib  # at the end of a run only: each start of a rank would wait for it

    matplotlib.use("Agg")  # draws without a display
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    steps = [record["step"] for record in records]
    axes.plot(steps, [record["raw"] for record in records], color="tab:gray", label="last iterate")
    axes.plot(steps, [record["uniform"] for record in records], color="tab:cyan", label="uniform average")
    axes.plot(steps, [record["recent"] for record in records], color="tab:blue", label="recent average (EMA)")
    for before, after in itertools.pairwise(records):
        if before["world_size"] != after["world_size"]:
            text = f" {before['world_size']} → {after['world_size']} ranks"
            axes.axvline(before["step"], color="black", linestyle=":", linewidth=1)
            axes.annotate(text, (before["step"], 0.9), xycoords=("data", "axes fraction"))
    axes.set(xlabel="step", ylabel="held-out bits per byte")
    axes.legend()
    return figure


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python launch/report.py OUT   (the directory or URL that train.py had as --out)")
    print(table(read_metrics(sys.argv[1])))
