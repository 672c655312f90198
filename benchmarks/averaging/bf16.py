"""Averages of bf16 parameters: ours beside torch.optim.ASGD and torch.optim.swa_utils.AveragedModel.

    python -m benchmarks.averaging.bf16

All are shown the same iterates, written into the parameter before each step of learning rate 0.

Drift: the parameter moves from 1 to 2 in 10,000 steps, rounded to bf16. An average in bf16 of n iterates moves towards
the next one by 1/n of the distance; soon that is less than half of its own resolution, 2^-7, and is lost.

Noise: 4096 independent iterates around 1, of standard deviation 0.1, for each of 4096 elements.

Errors are distances to the mean of the same iterates in fp64, root mean square over the elements. torch.optim.ASGD and
ours leave out the first iterate, AveragedModel does not; each is compared with the mean of what it takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import ASGD
from torch.optim.swa_utils import AveragedModel

from benchmarks.averaging.experiment import Curve, as_rank, compare_ranks, draw, on_ranks, parser_of, print_figures
from benchmarks.table import write_json_lines
from dist_asgd import ShardedASGD

ELEMENTS, DRIFT_STEPS, NOISE_STEPS = 4096, 10_000, 4096
POINTS = 50  # of a curve
COLUMNS = {
    "name": "",
    "ranks": "ranks",
    "drift": "drift: average",
    "drift_mean": "true mean",
    "noise_error": "noise: rms error",
}
FIGURES = ["drift", "noise_error"]
# Two functions: one takes up what the parameter is now, the other returns the average so far, (ELEMENTS,).
Average = tuple[Callable[[], Any], Callable[[], Tensor]]


def main() -> None:
    options = _options()
    if options.worker:
        as_rank(lambda: measure(ours, options.seed, skipped=1))
        return
    results = [on_ranks("bf16", ranks, f"--seed={options.seed}") for ranks in options.ranks]
    compare_ranks(results, FIGURES)
    rows = [{"name": "ours", "ranks": n, **result} for n, result in zip(options.ranks, results, strict=True)]
    rows.append({"name": "torch.optim.ASGD", "ranks": 1, **measure(torch_asgd, options.seed, skipped=1)})
    rows.append({"name": "torch AveragedModel", "ranks": 1, **measure(averaged_model, options.seed, skipped=0)})
    print(f"\n{ELEMENTS} bf16 elements, {DRIFT_STEPS} steps of drift, {NOISE_STEPS} of noise, seed {options.seed}\n")
    print_figures(rows, COLUMNS, {"drift": ".5f", "drift_mean": ".5f", "noise_error": ".1e"})
    write_json_lines(options.json, rows)
    _plot(options, rows)


def _options() -> argparse.Namespace:
    return parser_of(__doc__, "bf16").parse_args()


class Weight(nn.Module):
    """A model of one bf16 parameter, (ELEMENTS,)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ELEMENTS, dtype=torch.bfloat16))
        self.weight.grad = torch.zeros_like(self.weight)


def ours(model: Weight) -> Average:
    optimizer = ShardedASGD(model.named_parameters(), lr=0.0, lambd=0.0, t0=0)

    def step() -> None:
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()

    def average() -> Tensor:  # NaN on all ranks but the first, which reports
        full = optimizer.full_state_dict()
        return full["state"][0]["ax"] if full else torch.full((ELEMENTS,), torch.nan)

    return step, average


def torch_asgd(model: Weight) -> Average:
    optimizer = ASGD(model.parameters(), lr=0.0, lambd=0.0, t0=0)
    return optimizer.step, lambda: optimizer.state[model.weight]["ax"]


def averaged_model(model: Weight) -> Average:
    average = AveragedModel(model)
    return lambda: average.update_parameters(model), lambda: average.module.weight.detach()


def drift() -> Iterator[Tensor]:
    """From 1 to 2: the iterates, 0-dim."""
    for step in range(1, DRIFT_STEPS + 1):
        yield torch.tensor(1 + step / DRIFT_STEPS, dtype=torch.bfloat16)


def noise(seed: int) -> Iterator[Tensor]:
    """Independent iterates, (ELEMENTS,)."""
    draws = torch.Generator().manual_seed(seed)
    for _ in range(NOISE_STEPS):
        yield (1 + 0.1 * torch.randn(ELEMENTS, generator=draws)).bfloat16()


def measure(build: Callable[[Weight], Average], seed: int, skipped: int) -> dict[str, Any]:
    """Both figures, and how the average drifts. ``skipped`` of the first iterates are not in the average."""
    _, mean, curve = _follow(build, drift(), DRIFT_STEPS // POINTS, skipped)
    error, _, _ = _follow(build, noise(seed), NOISE_STEPS, skipped)
    return {"drift": curve[-1], "drift_mean": mean, "noise_error": error, "curve": curve}


def _follow(
    build: Callable[[Weight], Average], iterates: Iterator[Tensor], every: int, skipped: int
) -> tuple[float, float, list[float]]:
    """The rms error after all iterates, the true mean over the elements, and the average's mean every so often."""
    model = Weight()
    take, average = build(model)
    total, curve = torch.zeros(ELEMENTS, dtype=torch.float64), []
    error, count = torch.zeros(()), 0
    for count, iterate in enumerate(iterates, start=1):
        with torch.no_grad():
            model.weight.copy_(iterate)
        take()
        total += iterate if count > skipped else 0
        if count % every == 0:
            now = average()
            curve.append(now.double().mean().item())
            error = (now - total / (count - skipped)).square().mean().sqrt()
    return error.item(), (total / (count - skipped)).mean().item(), curve


def _plot(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    steps = [DRIFT_STEPS // POINTS * n for n in range(1, POINTS + 1)]
    curves = [
        Curve("the parameter", steps, [1 + step / DRIFT_STEPS for step in steps], "tab:gray"),
        Curve("its mean", steps, [1 + step / DRIFT_STEPS / 2 for step in steps], "black", ":"),
    ]
    looks = {"ours": ("tab:blue", "--"), "torch.optim.ASGD": ("tab:red", "-"), "torch AveragedModel": ("gold", "--")}
    for row in rows:
        if row["name"] != "ours" or row["ranks"] == options.ranks[0]:
            curves.append(Curve(f"average, {row['name']}", steps, row["curve"], *looks[row["name"]]))
    draw(options.plot, curves, title="A bf16 parameter that drifts", xlabel="step", ylabel="value")


if __name__ == "__main__":
    main()
