"""Least squares: the average of SGD's iterates is as good as any estimate can be (Polyak and Juditsky, 1992).

    python -m benchmarks.averaging.least_squares

128 regressions at once, with 20 features each: y = w·x + e, where x is Gaussian with variances from 1/2 to 1 along
the axes, and e is standard normal. Each step sees 64 new samples. No estimate from n samples has a mean excess risk
much lower than σ²d/n, and risks are given in units of that. The learning rate falls as t^(-1/2), far slower than the
1/t that the last iterate needs, and knows nothing of the variances.

It is done again with a learning rate that is too small: the iterates take long to leave their start behind, the
average remembers all of that, and loses. It wins again where averaging starts later. These two are run on one number
of ranks only.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.averaging.experiment import Curve, as_rank, compare_ranks, draw, on_ranks, parser_of, share_of
from benchmarks.table import print_table, write_json_lines
from dist_asgd import ShardedASGD

FEATURES, RUNS, BATCH, STEPS = 20, 128, 64, 4000
FLOAT = torch.float64


@dataclass(frozen=True, slots=True)
class Case:
    """How the regressions are trained."""

    lr: float  # at the first step
    t0: int  # averaging starts after so many steps
    style: str  # of its lines in the plot


CASES = {
    "well chosen": Case(2.0, 0, "-"),
    "too small": Case(0.2, 0, "--"),
    "too small, started later": Case(0.2, STEPS // 2, ":"),
}
COLUMNS = {
    "case": "learning rate",
    "lr": "at step 1",
    "t0": "t0",
    "ranks": "ranks",
    "average": "average / (σ²d/n)",
    "last": "last iterate / (σ²d/n)",
}


def main() -> None:
    options = _options()
    if options.worker:
        as_rank(lambda: measure(options.seed, CASES[options.case]))
        return
    rows: list[dict[str, Any]] = []
    for name, case in CASES.items():
        numbers = options.ranks if name == "well chosen" else options.ranks[:1]
        results = [on_ranks("least_squares", n, f"--seed={options.seed}", f"--case={name}") for n in numbers]
        for ranks, result in zip(numbers, results, strict=True):
            rows.append({"case": name, "lr": case.lr, "t0": case.t0, "ranks": ranks, **result})
        compare_ranks(results, ["average", "last"])
    print(f"\nMean excess risk of {RUNS} runs after {STEPS * BATCH} samples each, seed {options.seed}\n")
    print_table(rows, COLUMNS)
    write_json_lines(options.json, rows)
    _plot(options, rows)


def _options() -> argparse.Namespace:
    parser = parser_of(__doc__, "least_squares")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(seed: int, case: Case) -> dict[str, Any]:
    """Train on this process group; the risks at the end, and at about 40 times before, in units of σ²d/n."""
    draws = torch.Generator().manual_seed(seed)
    variances = torch.linspace(0.5, 1.0, FEATURES, dtype=FLOAT)  # (d,)
    truth = torch.randn(RUNS, FEATURES, generator=draws, dtype=FLOAT)  # (R, d): w of each regression
    model = nn.Linear(FEATURES, RUNS, bias=False, dtype=FLOAT)
    nn.init.zeros_(model.weight)
    optimizer = ShardedASGD(model.named_parameters(), lr=case.lr, lambd=0.0, t0=case.t0)
    schedule = LambdaLR(optimizer, lambda step: (step + 1) ** -0.5)
    times = {round(STEPS ** (k / 40)) for k in range(41)}
    curves: dict[str, list[float]] = {"samples": [], "average_curve": [], "last_curve": []}
    for step in range(1, STEPS + 1):
        x, y = _batch(draws, variances, truth)
        (model(x) - y).square().sum(1).mean().div(2).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step in times:
            unit = FEATURES / (step * BATCH)  # σ²d/n
            curves["samples"].append(step * BATCH)
            curves["last_curve"].append(_risk(model.weight, variances, truth) / unit)
            with optimizer.averaged_parameters():
                curves["average_curve"].append(_risk(model.weight, variances, truth) / unit)
    return {"average": curves["average_curve"][-1], "last": curves["last_curve"][-1], **curves}


def _batch(draws: torch.Generator, variances: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's rows of the next global batch: features (rows, d) and targets (rows, R)."""
    x = torch.randn(BATCH, FEATURES, generator=draws, dtype=FLOAT) * variances.sqrt()
    y = x @ truth.T + torch.randn(BATCH, RUNS, generator=draws, dtype=FLOAT)
    mine = share_of(BATCH)
    return x[mine], y[mine]


def _risk(weight: Tensor, variances: Tensor, truth: Tensor) -> float:
    """E (w·x - y)² above that of the truth, mean over the regressions."""
    return ((weight.detach() - truth).square() @ variances).mean().item()


def _plot(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    samples = rows[0]["samples"]
    optimum = [FEATURES / n for n in samples]
    curves = [Curve("σ²d/n", samples, optimum, "black", ":")]
    for row in rows:
        if row["ranks"] != options.ranks[0]:
            continue  # its curves are the same
        style, text = CASES[row["case"]].style, f"learning rate {row['case']}"
        last, average = (
            [r * best for r, best in zip(row[key], optimum, strict=True)] for key in ("last_curve", "average_curve")
        )
        if not row["t0"]:  # it is the same with another
            curves.append(Curve(f"last iterate, {text}", samples, last, "tab:gray", style))
        curves.append(Curve(f"average, {text}", samples, average, "tab:blue", style))
    axes = {"xscale": "log", "yscale": "log", "xlabel": "samples n", "ylabel": "excess risk"}
    draw(options.plot, curves, title="Least squares", **axes)


if __name__ == "__main__":
    main()
