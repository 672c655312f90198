"""The held-out losses of a run, and what its optimizer keeps."""

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import data
from console import say
from run import Progress, Run, next_byte_loss

AVERAGES = ("uniform", "recent")


@torch.no_grad()
def bits_per_byte(run: Run) -> float:
    """Held-out loss of the weights as they are. Each rank reads its share of the held-out text."""
    layout = run.layout
    nats = torch.zeros((), dtype=torch.float64, device=run.world.device)
    count = 0
    run.model.eval()
    for x, y in data.held_out_batches(run.text.held_out, layout.data_rank, layout.data_size, length=run.args.length):
        nats += next_byte_loss(run, x, y, "sum")
        count += y.numel()
    run.model.train()
    total, bytes_read = layout.sum(nats.item(), count)
    return total / bytes_read / math.log(2)


def optimizer_bytes(run: Run) -> int:
    """Bytes of optimizer state on the rank that has most of it."""
    total = 0
    for state in run.optimizer.state_dict()["state"].values():
        for name, value in state.items():
            # Until averaging starts, mu is 1 and an average is the parameter itself.
            if not name.startswith("ax") or state[name.replace("ax", "mu")] != 1:
                local = value.to_local() if isinstance(value, DTensor) else getattr(value, "local", value)
                total += local.nbytes  # this rank's block, or piece of it; with one rank, the whole
    return int(run.world.max(total)[0])


def torch_bytes(model: nn.Module) -> int:
    """Returns the bytes that torch keeps on every rank for both averages.

    torch.optim.ASGD has `ax`, as large as the parameter, and fp32 step, eta and mu; AveragedModel has another copy.
    """
    return sum(2 * p.numel() * p.element_size() + 3 * 4 for p in model.parameters())


def evaluate(run: Run, progress: Progress) -> dict[str, Any]:
    """A record for metrics.jsonl, the same on every rank. Begins to count losses anew."""
    raw = bits_per_byte(run)
    averaged = {}
    for name in AVERAGES:
        with run.optimizer.averaged_parameters(name):
            averaged[name] = bits_per_byte(run)
    figures = ", ".join(f"{name} average {figure:.4f}" for name, figure in averaged.items())
    say(run.world, f"step {progress.step:6}: held-out bits per byte {raw:.4f}, {figures}")
    train_loss = run.layout.sum(float(progress.losses))[0] / progress.seen / math.log(2)
    progress.losses, progress.seen = 0.0, 0
    progress.best = min(averaged["recent"], progress.best or math.inf)
    return {
        "step": progress.step,
        "raw": raw,
        **averaged,
        "train": train_loss,
        "best": progress.best,
        "world_size": run.world.size,
        "optimizer_bytes": optimizer_bytes(run),
        "torch_bytes": torch_bytes(run.model),
    }


def held_out(record: dict[str, Any]) -> dict[str, float]:
    """Returns the losses of a record by their keys in OperatorMetrics."""
    averages = {f"bits_per_byte/{name}": record[name] for name in AVERAGES}
    return {"bits_per_byte": record["raw"], "train": record["train"], **averages}
