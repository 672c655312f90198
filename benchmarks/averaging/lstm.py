"""The recipe of AWD-LSTM on a byte-level LSTM: plain SGD, and averaging once the validation loss stops to fall.

    python -m benchmarks.averaging.lstm

Merity, Keskar and Socher (2017) train by SGD with a constant learning rate. At the first evaluation whose loss is
above the best of all but the last 5 (the non-monotonic trigger), averaging starts, and the average is the result.
Model, text, learning rate and clipping are those of launch/train.py; the model is narrower and the text shorter. A
quarter of an epoch, where the paper has a whole one, lies between two evaluations. Averaging goes on for one epoch.

The peer is torch.optim.SGD on one rank for as many steps, with a learning rate that falls linearly to 0 over the last
part of them. Learning rate and part are tuned on the validation text by a full grid. The recipe is not tuned.

With so high a learning rate the smallest difference in rounding grows within some hundred steps until two runs have
nothing in common but their statistics. So the number of ranks, which changes the order of sums, is one seed more, and
figures are means of several.

The text is cut in three: to train on, to validate on (the trigger, and the peer's tuning), and to test on (the table).
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.averaging.experiment import Curve, as_rank, draw, on_ranks, parser_of, print_figures
from benchmarks.table import write_json_lines
from dist_asgd import NonMonotonicTrigger, ShardedASGD
from launch import data
from launch.model import build_model

TEXT, HELD_OUT = 3 * 2**17, 2**16  # bytes in all, and bytes held out of them
WIDTH, BATCH, LENGTH, CLIP = 64, 16, 32, 1.0
LEARNING_RATE = 10.0
EPOCH = (TEXT - HELD_OUT) // (BATCH * LENGTH)  # steps that read as many bytes as there are to train on
EVERY = EPOCH // 4  # steps between two evaluations
MAX_EPOCHS = 20
GRID = {"lr": (5.0, 10.0, 20.0), "part": (1.0, 0.5, 0.2)}
COLUMNS = {
    "name": "",
    "ranks": "ranks",
    "lr": "lr",
    "part": "falls over the last",
    "trigger": "averages from step",
    "steps": "steps",
    "validation": "validation, bits/byte",
    "test": "test, bits/byte",
    "raw_test": "test, raw weights",
    "spread": "test, spread of seeds",
}


def main() -> None:
    options = _options()
    if options.worker:
        task = partial(averaged_sgd, options.seed)
        if options.steps:
            task = partial(decayed_sgd, options.seed, options.lr, options.part, options.steps)
        as_rank(task)
        return
    seeds = range(options.seed, options.seed + options.seeds)
    results = [[on_ranks("lstm", ranks, f"--seed={seed}") for seed in seeds] for ranks in options.ranks]
    rows = [
        {"name": "SGD, then averaging", "ranks": ranks, "lr": LEARNING_RATE, "part": None, **_mean(of_seeds)}
        for ranks, of_seeds in zip(options.ranks, results, strict=True)
    ]
    steps = {seed: result["steps"] for seed, result in zip(seeds, results[0], strict=True)}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each is a process of one thread
        peers = list(pool.map(lambda one: _decayed(steps, *one), itertools.product(*GRID.values())))
    best = min(peers, key=lambda row: row["validation"])
    best["name"] = "SGD, tuned decay"
    rows += peers
    text = _read()
    print(f"\n{len(text.train)} bytes to train on (text {text.digest}), {EPOCH} steps an epoch, seeds {[*seeds]}\n")
    numbers = {"validation": ".4f", "test": ".4f", "raw_test": ".4f", "spread": ".3f"}
    print_figures(rows, COLUMNS, {"part": ".1f", "trigger": ".0f", "steps": ".0f", **numbers})
    write_json_lines(options.json, rows)
    _plot(options, rows[0], best)


def _decayed(steps: dict[int, int], lr: float, part: float) -> dict[str, Any]:
    """Of all seeds, each for as many steps as the recipe took."""
    arguments = [(f"--seed={seed}", f"--steps={count}") for seed, count in steps.items()]
    results = [on_ranks("lstm", 1, *one, f"--lr={lr}", f"--part={part}") for one in arguments]
    return {"name": "SGD, decay", "ranks": 1, "lr": lr, "part": part, **_mean(results)}


def _mean(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The curves are those of the first seed."""
    tests = [result["test"] for result in results]
    mean = {**results[0], "spread": max(tests) - min(tests)}
    for key in ("trigger", "steps", "validation", "test", "raw_test"):
        found = [result[key] for result in results]
        mean[key] = None if None in found else sum(found) / len(found)
    mean["first_trigger"] = results[0]["trigger"]
    return mean


def _options() -> argparse.Namespace:
    parser = parser_of(__doc__, "lstm")
    parser.add_argument("--seeds", type=int, default=4, help="how many, from --seed on")
    parser.add_argument("--lr", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--part", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


@dataclass(frozen=True, slots=True)
class Task:
    """A model and its text, the same on all ranks."""

    seed: int
    model: nn.Module
    train: Tensor  # bytes, as the next two
    validation: Tensor
    test: Tensor

    def backward(self, step: int) -> None:
        """Gradients of this rank's share of the step's global batch."""
        share = data.rank_share(BATCH, dist.get_rank(), dist.get_world_size())
        x, y = data.sequences(self.train, share, seed=self.seed, step=step, length=LENGTH)  # (b, T) each
        F.cross_entropy(self.model(x), y.flatten()).backward()

    @torch.no_grad()
    def bits_per_byte(self, text: Tensor) -> float:
        """Loss of the weights as they are; each rank reads its share of the text."""
        nats, count = 0.0, 0
        for x, y in data.held_out_batches(text, dist.get_rank(), dist.get_world_size(), length=LENGTH):
            nats += F.cross_entropy(self.model(x), y.flatten(), reduction="sum").item()
            count += y.numel()
        total = torch.tensor([nats, count], dtype=torch.float64)
        dist.all_reduce(total)
        return (total[0] / total[1]).item() / math.log(2)


def _read() -> data.Text:
    return data.read_text((), max_bytes=TEXT, held_out_bytes=HELD_OUT)


def _task(seed: int) -> Task:
    text = _read()
    torch.manual_seed(seed)
    model = build_model("lstm", width=WIDTH, layers=1, heads=1, context=LENGTH, dropout=0.0)
    validation, test = text.held_out.chunk(2)
    return Task(seed, model, text.train, validation, test)


def averaged_sgd(seed: int) -> dict[str, Any]:
    """SGD until the trigger, then one epoch of averaging, on this process group."""
    task, trigger = _task(seed), NonMonotonicTrigger(n=5)
    optimizer = ShardedASGD(task.model.named_parameters(), lr=LEARNING_RATE, lambd=0.0, t0=math.inf)
    curves: dict[str, list[float]] = {"evaluated": [], "raw_curve": [], "average_curve": []}
    started = None
    for step in range(1, MAX_EPOCHS * EPOCH + 1):
        task.backward(step)
        optimizer.clip_grad_norm_(CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if step % EVERY == 0:
            curves["evaluated"].append(step)
            curves["raw_curve"].append(task.bits_per_byte(task.test))
            with optimizer.averaged_parameters():
                curves["average_curve"].append(task.bits_per_byte(task.test))
            if started is None and trigger.step(task.bits_per_byte(task.validation)):
                optimizer.start_averaging()
                started = step
        if started is not None and step == started + EPOCH:
            break
    else:
        raise RuntimeError(f"the trigger has not fired early enough in {MAX_EPOCHS} epochs")
    with optimizer.averaged_parameters():
        validation = task.bits_per_byte(task.validation)
    after = {"test": curves["average_curve"][-1], "raw_test": curves["raw_curve"][-1]}
    return {"trigger": started, "steps": step, "validation": validation, **after, **curves}


def decayed_sgd(seed: int, lr: float, part: float, steps: int) -> dict[str, Any]:
    """torch.optim.SGD on one rank; the learning rate falls linearly to 0 over the last ``part`` of the steps."""
    task = _task(seed)
    optimizer = torch.optim.SGD(task.model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, (steps - done) / (part * steps)))
    curves: dict[str, list[float]] = {"evaluated": [], "raw_curve": []}
    for step in range(1, steps + 1):
        task.backward(step)
        nn.utils.clip_grad_norm_(task.model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % EVERY == 0:
            curves["evaluated"].append(step)
            curves["raw_curve"].append(task.bits_per_byte(task.test))
    test = curves["raw_curve"][-1]
    validation = task.bits_per_byte(task.validation)
    return {"trigger": None, "steps": steps, "validation": validation, "test": test, "raw_test": test, **curves}


def _plot(options: argparse.Namespace, averaged: dict[str, Any], decayed: dict[str, Any]) -> None:
    x, low, high = averaged["evaluated"], averaged["test"] - 0.1, averaged["raw_curve"][1]
    curves = [
        Curve("constant learning rate, raw weights", x, averaged["raw_curve"], "tab:gray"),
        Curve("constant learning rate, average", x, averaged["average_curve"], "tab:blue"),
        Curve("SGD, tuned decay", decayed["evaluated"], decayed["raw_curve"], "tab:orange"),
        Curve("the trigger", [averaged["first_trigger"]] * 2, [low, high], "black", ":"),
    ]
    axes = {"xlabel": "step", "ylabel": "test, bits per byte", "ylim": (low, high)}
    draw(options.plot, curves, title="Byte-level LSTM", **axes)


if __name__ == "__main__":
    main()
