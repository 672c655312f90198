"""Averages beside AdamW on a byte-level GPT: an EMA, and merges of checkpoints, in place of a decay of the rate.

    python -m benchmarks.averaging.adamw

AdamW trains the GPT of launch/train.py at a learning rate that is constant after a warmup. `ShardedAverages` keeps EMAs
of several widths beside it. From a branch point on, checkpoints are saved at equal distances, that point and the end
included, and `merge` makes means of them whose weights stand for a decay of the rate: of all, and of fewer, further
apart. The peers are real decays, which start from the checkpoint of the branch point and take as many further steps on
the same data.

The rate is tuned for the peer: it is the one at which, with the first seed, the last iterate of the linear decay has
the lowest loss on the validation text. The second table has the other rates, with that seed. Figures are of the test
text, means over several seeds. The first seed is run on 2 ranks as well, with the same global batch.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.averaging.experiment import Curve, as_rank, compare_ranks, draw, on_ranks, parser_of, print_figures
from benchmarks.table import write_json_lines
from dist_asgd import EMA, Checkpointer, ShardedAverages, load, merge
from dist_asgd.checkpoint.merging.weights import DECAYS
from launch import data
from launch.model import build_model

LENGTH, CLIP = 64, 1.0
RATES = (0.003, 0.008, 0.02)
AVERAGES = {f"EMA {fraction}": f"ema_{fraction}".replace(".", "_") for fraction in (0.02, 0.05, 0.1)}
KINDS = {name: EMA(half_life_fraction=float(said.split()[1])) for said, name in AVERAGES.items()}
LAST, DRAWN, MERGED, DECAYED = SHOWN = "last iterate", "EMA 0.05", "merge, linear", "decay, linear"
COLUMNS = {
    "name": "",
    "lr": "lr",
    "ranks": "ranks",
    "validation": "validation, bits/byte",
    "test": "test, bits/byte",
    "gain": "below the last iterate",
    "least_gain": "in the worst seed",
    "loss": "above the linear decay",
}
FORMATS = {"lr": ".3f", "validation": ".4f", "test": ".4f", "gain": ".4f", "least_gain": ".4f", "loss": ".4f"}


@dataclass(frozen=True, slots=True)
class Size:
    """How much is trained."""

    text: int = 2**22  # bytes in all
    held_out: int = 2**15  # bytes held out of them, half to validate and half to test on
    width: int = 32
    batch: int = 4  # sequences in a step, over all ranks
    warmup: int = 100  # steps
    branch: int = 900  # steps before decays begin
    more: int = 300  # steps from there on
    distance: int = 10  # steps between two checkpoints
    apart: int = 50  # steps between two of the fewer checkpoints that are merged, too, and between points of curves

    @property
    def end(self) -> int:
        """The last step."""
        return self.branch + self.more


SIZES = {
    "full": Size(),
    "tiny": Size(text=2**14, held_out=2**10, width=8, batch=2, warmup=2, branch=4, more=4, distance=1, apart=2),
}


def main() -> None:
    options = _options()
    size = SIZES[options.size]
    if options.worker:
        seeds = range(options.seed, options.seed + options.seeds)
        as_rank(lambda: {"of_seeds": [measure(seed, options.lr, size) for seed in seeds]})
        return
    first, more = options.seed, options.seeds - 1
    tried = {lr: _on_ranks(options, 1, lr, first, 1)[0] for lr in options.rates}
    best = min(tried, key=lambda lr: tried[lr]["validation"][DECAYED])
    rows = _rows([tried[best], *(_on_ranks(options, 1, best, first + 1, more) if more else ())], best, 1)
    others = [_row(_rows([result], lr, 1), name) for lr, result in tried.items() for name in SHOWN]
    for ranks in (ranks for ranks in options.ranks if ranks > 1):
        (result,) = _on_ranks(options, ranks, best, first, 1)
        compare_ranks([tried[best]["test"], result["test"]], list(result["test"]))
        others += [_row(_rows([result], best, ranks), name) for name in SHOWN]
    print(f"\n{size}, text {_read(size).digest}\n\nseeds {[*range(first, first + options.seeds)]}\n")
    print_figures(rows, COLUMNS, FORMATS)
    print(f"\nseed {first}\n")
    print_figures(others, COLUMNS, FORMATS)
    write_json_lines(options.json, rows + others)
    _plot(options, size, tried[best])


def _options() -> argparse.Namespace:
    parser = parser_of(__doc__, "adamw")
    parser.set_defaults(ranks=[1, 2])
    parser.add_argument("--seeds", type=int, default=4, help="how many, from --seed on")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, metavar="LR")
    parser.add_argument("--size", choices=SIZES, default="full", help="tiny: to see that it runs")
    parser.add_argument("--lr", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def _on_ranks(options: argparse.Namespace, ranks: int, lr: float, seed: int, seeds: int) -> list[dict[str, Any]]:
    """Returns what ``measure`` does for each of ``seeds`` seeds from ``seed`` on."""
    arguments = (f"--lr={lr}", f"--seed={seed}", f"--seeds={seeds}", f"--size={options.size}")
    found: list[dict[str, Any]] = on_ranks("adamw", ranks, *arguments)["of_seeds"]
    return found


def _rows(results: list[dict[str, Any]], lr: float, ranks: int) -> list[dict[str, Any]]:
    """Returns a row for each way to the weights, with means over the seeds."""
    validation, test = [result["validation"] for result in results], [result["test"] for result in results]
    rows = []
    for name in test[0]:
        gains = [figures[LAST] - figures[name] for figures in test]
        rows.append(
            {
                "name": name,
                "lr": lr,
                "ranks": ranks,
                "validation": _mean([figures[name] for figures in validation]),
                "test": _mean([figures[name] for figures in test]),
                "gain": _mean(gains),
                "least_gain": min(gains),
                "loss": _mean([figures[name] - figures[DECAYED] for figures in test]),
            }
        )
    return rows


def _mean(figures: list[float]) -> float:
    return sum(figures) / len(figures)


def _row(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(row for row in rows if row["name"] == name)


@dataclass(frozen=True, slots=True)
class Task:
    """A model, its optimizer and its text; the same on all ranks."""

    seed: int
    size: Size
    text: data.Text
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def train(self, first: int, last: int, rate: Callable[[int], float]) -> None:
        """Takes the steps from ``first`` to ``last``, each at its ``rate``."""
        share = data.rank_share(self.size.batch, dist.get_rank(), dist.get_world_size())
        for step in range(first, last + 1):
            for group in self.optimizer.param_groups:
                group["lr"] = rate(step)
            x, y = data.sequences(self.text.train, share, seed=self.seed, step=step, length=LENGTH)  # (b, T) each
            F.cross_entropy(self.model(x), y.flatten()).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad()

    @torch.no_grad()
    def bits_per_byte(self, half: int) -> float:
        """Loss of the weights as they are on the text to validate (0) or to test on (1); ranks share it."""
        text, nats, count = self.text.held_out.chunk(2)[half], 0.0, 0
        for x, y in data.held_out_batches(text, dist.get_rank(), dist.get_world_size(), length=LENGTH):
            nats += F.cross_entropy(self.model(x), y.flatten(), reduction="sum").item()
            count += y.numel()
        total = torch.tensor([nats, count], dtype=torch.float64)
        dist.all_reduce(total)
        return (total[0] / total[1]).item() / math.log(2)


@dataclass(frozen=True, slots=True)
class Figures:
    """Bits per byte by the way to the weights."""

    validation: dict[str, float] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)  # of the test text, one point every ``distance``

    def evaluate(self, name: str, task: Task) -> None:
        """Takes the figures of the weights as they are."""
        self.validation[name], self.test[name] = task.bits_per_byte(0), task.bits_per_byte(1)

    def add_point(self, name: str, task: Task) -> None:
        """Adds what the weights as they are have to a curve."""
        self.curves.setdefault(name, []).append(task.bits_per_byte(1))


@functools.cache
def _read(size: Size) -> data.Text:
    return data.read_text((), max_bytes=size.text, held_out_bytes=size.held_out)


def _task(seed: int, size: Size) -> Task:
    torch.manual_seed(seed)
    model = build_model("gpt", width=size.width, layers=2, heads=4, context=LENGTH, dropout=0.0)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    return Task(seed, size, _read(size), wrapped, optimizer)


def measure(seed: int, lr: float, size: Size) -> dict[str, Any]:
    """Trains, averages, merges and decays on this process group."""
    figures = Figures()
    with _shared_folder() as folder:
        _train_at_a_constant_rate(seed, lr, size, folder / "run", figures)
        for distance, shape in itertools.product((size.apart, size.distance), DECAYS):
            _merge(distance, shape, seed, size, folder, figures)
        for shape in DECAYS:
            _decay(seed, lr, size, folder / "run", shape, figures)
    return asdict(figures)


@contextlib.contextmanager
def _shared_folder() -> Iterator[Path]:
    """Yields an empty folder that all ranks share, and removes it afterwards."""
    box: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    try:
        yield Path(box[0])
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(box[0])


def _train_at_a_constant_rate(seed: int, lr: float, size: Size, run: Path, figures: Figures) -> None:
    """Trains to the end with averages, and saves checkpoints from the branch point on."""
    task = _task(seed, size)
    averages = ShardedAverages(task.model.named_parameters(), KINDS, optimizer=task.optimizer, module=task.model)
    with Checkpointer(run) as checkpoints:
        for step in range(1, size.end + 1):
            task.train(step, step, lambda step: lr * min(1.0, step / size.warmup))
            if step % size.apart == 0:
                figures.add_point(LAST, task)
                with averages.averaged_parameters(AVERAGES[DRAWN]):
                    figures.add_point(DRAWN, task)
            if step >= size.branch and step % size.distance == 0:
                checkpoints.save(step, {"model": task.model, "optimizer": task.optimizer, "averages": averages})
    figures.evaluate(LAST, task)
    for said, name in AVERAGES.items():
        with averages.averaged_parameters(name):
            figures.evaluate(said, task)


def _merge(distance: int, shape: str, seed: int, size: Size, folder: Path, figures: Figures) -> None:
    """Merges the checkpoints at a distance by the weights that stand for a decay."""
    name = f"merge, {shape}" if distance == size.distance else f"merge of fewer, {shape}"
    merge(folder / "run", folder / name, steps=f"{size.branch}:{size.end}:{distance}", decay=shape)
    task = _task(seed, size)
    load(folder / name, {"model": task.model})
    figures.evaluate(name, task)


def _decay(seed: int, lr: float, size: Size, run: Path, shape: str, figures: Figures) -> None:
    """Goes on from the checkpoint of the branch point to the end, while the rate falls to 0."""
    task, name = _task(seed, size), f"decay, {shape}"
    with Checkpointer(run) as checkpoints:
        checkpoints.load({"model": task.model, "optimizer": task.optimizer}, step=size.branch)

    def rate(step: int) -> float:
        return lr * DECAYS[shape]((step - 1 - size.branch) / size.more)

    for start in range(size.branch, size.end, size.apart):
        task.train(start + 1, start + size.apart, rate)
        figures.add_point(name, task)
    figures.evaluate(name, task)


def _plot(options: argparse.Namespace, size: Size, result: dict[str, Any]) -> None:
    curves, merged = result["curves"], result["test"][MERGED]
    steps = range(size.apart, size.end + 1, size.apart)
    further = [step for step in steps if step > size.branch]
    drawn = [
        Curve("constant rate, last iterate", steps, curves[LAST], "tab:gray"),
        Curve("constant rate, EMA with a half-life of 5 %", steps, curves[DRAWN], "tab:blue"),
        Curve("linear decay of the rate", further, curves[DECAYED], "tab:orange"),
        Curve("merge of checkpoints, linear", [size.branch, size.end], [merged, merged], "black", ":"),
    ]
    low = min(merged, curves[DECAYED][-1], curves[DRAWN][-1])
    axes = {"xlabel": "step", "ylabel": "test, bits per byte", "ylim": (low - 0.05, low + 0.75)}
    draw(options.plot, drawn, title="Byte-level GPT, AdamW", **axes)


if __name__ == "__main__":
    main()
