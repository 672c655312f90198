"""What all parts of train.py work on: a run, which does not change, and its progress, which does."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from arguments import Args
from dist_asgd import EMA, Checkpointer, ShardedASGD, Uniform
from dist_asgd.checkpoint.storage.retry import RETRY_TIMEOUT
from model import build_model
from parallel import Layout, layout_of
from world import World


@dataclass(frozen=True, slots=True)
class Run:
    """What a step needs. The same on every rank, but for `world` and the share of the state that `optimizer` has."""

    args: Args
    world: World
    text: data.Text
    layout: Layout
    model: nn.Module  # to be called; in what it is wrapped and where its parameters lie depends on the layout
    optimizer: ShardedASGD
    checkpointer: Checkpointer | None

    def identity(self) -> dict[str, Any]:
        """What may not change when a run is resumed: with another value it would be another run."""
        names = ["model", "width", "layers", "heads", "dropout", "held_out_bytes", "length", "batch", "seed"]
        names += ["lr", "lambd", "t0", "recent", "clip"]
        return {name: getattr(self.args, name) for name in names} | {"text": self.text.digest}


@dataclass(slots=True)
class Progress:
    """Where the training is."""

    step: int = 0
    best: float | None = None  # lowest bits per byte of the recent average so far
    losses: float | Tensor = 0.0  # of this rank, added up since the last evaluation, in nats
    seen: int = 0  # sequences in those, over all ranks


def build_run(args: Args, world: World) -> Run:
    """Read the text, and build the model and its optimizer."""
    layout = layout_of(args.parallel, world, args.heads)
    for name, rows in {"batch": args.batch, "held-out-bytes": (args.held_out_bytes - 1) // args.length}.items():
        if rows < layout.data_size:
            raise SystemExit(f"--{name} makes {rows} sequences; {layout.data_size} ranks want one each: raise it.")
    text = data.read_text(args.data, max_bytes=args.max_bytes, held_out_bytes=args.held_out_bytes)
    if text.digest != world.from_rank_zero(lambda: text.digest):
        raise SystemExit(f"Rank {world.rank} has other text than rank 0: they must see the same files.")
    torch.manual_seed(args.seed)
    model = build_model(
        args.model,
        width=args.width,
        layers=args.layers,
        heads=args.heads,
        context=args.length,
        dropout=args.dropout,
    ).to(world.device)
    called, options = layout.spread(model)
    options |= {"average": {"uniform": Uniform(), "recent": EMA(args.recent)}}
    options |= {"verify_every": args.verify_every or None}
    optimizer = ShardedASGD(model.named_parameters(), lr=args.lr, lambd=args.lambd, t0=args.t0, **options)
    checkpointer = None
    if args.checkpoint_dir:  # a storage that fails is given up before the ranks that wait for it give up
        patience = min(RETRY_TIMEOUT, args.timeout / 2)
        checkpointer = Checkpointer(args.checkpoint_dir, keep_last=args.keep_last or None, retry_timeout=patience)
    return Run(args, world, text, layout, called, optimizer, checkpointer)


def next_byte_loss(run: Run, x: Tensor, y: Tensor, reduction: str) -> Tensor:
    """Cross-entropy, in nats, of the bytes y (B, T) that follow the bytes x (B, T)."""
    x, y = x.to(run.world.device), y.to(run.world.device)
    return F.cross_entropy(run.model(x), y.flatten(), reduction=reduction)
