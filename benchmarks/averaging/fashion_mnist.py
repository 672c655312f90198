"""Fashion-MNIST, softmax regression: two epochs of averaged SGD come near the optimum, which SGD alone does not.

    apt-get install dataset-fashion-mnist        # Debian, Ubuntu: 31 MB in /usr/share/datasets/fashion-mnist
    python -m benchmarks.averaging.fashion_mnist

The mean image is subtracted, and images are scaled to a mean length of 1. Batches of 8, a learning rate that is
constant but for ASGD's own decay, and an average that starts after a quarter of an epoch. L-BFGS finds the optimum of
the same objective. With a well chosen learning rate the iterates fluctuate around the optimum, and their average is
near it; with one that is too small they are still on their way to it, the average lags behind them, and loses. That
one is run on one number of ranks only.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.averaging.experiment import Curve, as_rank, compare_ranks, draw, on_ranks, parser_of, share_of
from benchmarks.table import print_table, write_json_lines
from dist_asgd import ShardedASGD

FILES = Path("/usr/share/datasets/fashion-mnist")  # where the Debian package has them; --data names another place
PIXELS, CLASSES, BATCH, EPOCHS = 784, 10, 8, 2
LEARNING_RATES = {"well chosen": 16.0, "too small": 1.0}
LAMBD = 1e-5
EVALUATIONS = 20  # per epoch
COLUMNS = {
    "case": "learning rate",
    "lr": "lr",
    "ranks": "ranks",
    "average_1": "1 epoch: average, %",
    "last_1": "last iterate, %",
    "average_2": "2 epochs: average, %",
    "last_2": "last iterate, %",
    "optimum": "L-BFGS, %",
}
Labelled = tuple[Tensor, Tensor]  # images (n, 784), labels (n,)


def main() -> None:
    options = _options()
    if options.worker:
        as_rank(lambda: measure(options.data, options.seed, options.lr))
        return
    optimum = solve(options.data)
    print(f"the optimum, by L-BFGS: objective {optimum['objective']:.4f}, test error {optimum['error']:.2f} %")
    rows: list[dict[str, Any]] = []
    figures = ["average_1", "last_1", "average_2", "last_2"]
    for case, lr in LEARNING_RATES.items():
        arguments = (f"--seed={options.seed}", f"--lr={lr}", f"--data={options.data}")
        numbers = options.ranks if case == "well chosen" else options.ranks[:1]
        results = [on_ranks("fashion_mnist", ranks, *arguments) for ranks in numbers]
        for ranks, result in zip(numbers, results, strict=True):
            rows.append({"case": case, "lr": lr, "ranks": ranks, "optimum": optimum["error"], **result})
        compare_ranks(results, figures)
    print(f"\nTest error, seed {options.seed}\n")
    print_table(rows, COLUMNS)
    write_json_lines(options.json, rows)
    _plot(options, rows)


def _options() -> argparse.Namespace:
    parser = parser_of(__doc__, "fashion_mnist")
    parser.add_argument("--data", type=Path, default=FILES, metavar="FOLDER")
    parser.add_argument("--lr", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(folder: Path, seed: int, lr: float) -> dict[str, Any]:
    """Train on this process group; test errors after each epoch, and at times before, in percent."""
    (images, labels), test = _read(folder)
    model = _model()
    steps = len(images) // BATCH  # of an epoch
    optimizer = ShardedASGD(model.named_parameters(), lr=lr, lambd=LAMBD, t0=steps // 4)
    draws = torch.Generator().manual_seed(seed)
    curves: dict[str, list[float]] = {"epochs": [], "average_curve": [], "last_curve": []}
    for epoch in range(EPOCHS):
        order = torch.randperm(len(images), generator=draws).view(steps, BATCH)
        for step, batch in enumerate(order, start=1):
            mine = batch[share_of(BATCH)]
            F.cross_entropy(model(images[mine]), labels[mine]).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % (steps // EVALUATIONS) == 0:
                curves["epochs"].append(epoch + step / steps)
                curves["last_curve"].append(_error(model, test))
                with optimizer.averaged_parameters():
                    curves["average_curve"].append(_error(model, test))
    after = {
        f"{name}_{n}": curves[f"{name}_curve"][n * EVALUATIONS - 1] for name in ("average", "last") for n in (1, 2)
    }
    return {**after, **curves}


def solve(folder: Path, iterations: int = 400) -> dict[str, float]:
    """The optimum of what ``measure`` minimises: the mean cross-entropy of all images + lambd/2·|w|²."""
    (images, labels), test = _read(folder)
    model = _model()
    solver = torch.optim.LBFGS(
        model.parameters(), max_iter=iterations, history_size=20, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        solver.zero_grad()
        square = sum((p.square().sum() for p in model.parameters()), torch.zeros(()))
        value = F.cross_entropy(model(images), labels) + LAMBD / 2 * square
        value.backward()
        return value

    solver.step(objective)
    return {"objective": objective().item(), "error": _error(model, test)}


def _model() -> nn.Linear:
    model = nn.Linear(PIXELS, CLASSES)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


@torch.no_grad()
def _error(model: nn.Linear, labelled: Labelled) -> float:
    """Percent of the images that are given a wrong label."""
    images, labels = labelled
    return 100 * (model(images).argmax(1) != labels).sum().item() / len(labels)


def _read(folder: Path) -> tuple[Labelled, Labelled]:
    """To train on, and to test on."""
    try:
        (images, labels), (test_images, test_labels) = (_part(folder, name) for name in ("train", "t10k"))
    except FileNotFoundError as error:
        raise SystemExit(
            f"{error.filename} is not there. On Debian and Ubuntu: apt-get install dataset-fashion-mnist. Elsewhere, "
            "get the .gz files of github.com/zalandoresearch/fashion-mnist, data/fashion, and give --data their folder."
        ) from None
    mean = images.mean(0)
    length = (images - mean).norm(dim=1).mean()
    return ((images - mean) / length, labels), ((test_images - mean) / length, test_labels)


def _part(folder: Path, name: str) -> Labelled:
    images = _bytes(folder / f"{name}-images-idx3-ubyte.gz", header=16).view(-1, PIXELS).float()
    return images, _bytes(folder / f"{name}-labels-idx1-ubyte.gz", header=8).long()


def _bytes(path: Path, header: int) -> Tensor:
    return torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())), dtype=torch.uint8)[header:]


def _plot(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    curves = []
    for row in rows:
        if row["ranks"] == options.ranks[0]:
            style, text = "-" if row["case"] == "well chosen" else "--", f"learning rate {row['case']}"
            curves.append(Curve(f"last iterate, {text}", row["epochs"], row["last_curve"], "tab:gray", style))
            curves.append(Curve(f"average, {text}", row["epochs"], row["average_curve"], "tab:blue", style))
    curves.append(Curve("L-BFGS", [0, EPOCHS], [rows[0]["optimum"]] * 2, "black", ":"))
    axes = {"xlabel": "epochs", "ylabel": "test error, %", "ylim": (15, 25)}
    draw(options.plot, curves, title="Fashion-MNIST, softmax regression", **axes)


if __name__ == "__main__":
    main()
