"""The command line of train.py."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dist_asgd.cli.arguments import Parser
from parallel import MODES
from world import PREEMPTED

DESCRIPTION = "Trains a byte-level language model with ShardedASGD, and shows what averaging is worth."
MAX_TIMEOUT = 10**6  # seconds
LEARNING_RATE = {"gpt": 3.0, "lstm": 10.0}  # SGD wants a large one where the gradient is clipped


def option(default: Any, text: str, **more: Any) -> Any:
    """A field of Args with what argparse wants to know about it."""
    told = default not in ("", ()) and default == default  # what is empty or NaN is explained by the text
    return field(default=default, metadata={"help": f"{text} (default: {default})" if told else text, **more})


@dataclass(frozen=True, slots=True, kw_only=True)
class Args:
    """The command line: each field is an option."""

    model: str = option("gpt", "the model", choices=["gpt", "lstm"])
    width: int = option(96, "width of its layers")
    layers: int = option(2, "number of its layers")
    heads: int = option(4, "attention heads of the gpt")
    dropout: float = option(0.0, "dropout of the lstm")
    data: Sequence[str] = option((), "URLs, globs or paths of text; without, Python's standard library", nargs="+")
    max_bytes: int = option(4_000_000, "read no more text than this")
    held_out_bytes: int = option(2**16, "hold out this much of its end, to be evaluated on")
    length: int = option(64, "bytes in a sequence")
    batch: int = option(4, "sequences in a step, over all ranks")
    steps: int = option(1600, "train until this step")
    seed: int = option(0, "of the first weights and the order of the data")
    lr: float = option(math.nan, "learning rate (default: {gpt} for gpt, {lstm} for lstm)".format(**LEARNING_RATE))
    lambd: float = option(1e-6, "ASGD's decay")
    t0: float = option(1000.0, "start averaging at this step")
    recent: float = option(0.99, "decay of the recent average, an exponential moving average")
    clip: float = option(1.0, "clip the gradient to this norm")
    verify_every: int = option(0, "look for flipped bits every so many steps, by comparing the ranks; 0: never")
    eval_every: int = option(100, "evaluate every so many steps")
    out: str = option("runs/train", "directory or URL for metrics.jsonl and loss.png")
    metrics_file: str = option("", "local *.prom file for node_exporter's textfile collector, kept up to date")
    tensorboard: str = option("", "directory for TensorBoard, which gets the same numbers")
    checkpoint_dir: str = option("", "directory or URL for checkpoints; without, none are made")
    checkpoint_every: int = option(400, "save every so many steps; also at the end and at a signal")
    keep_last: int = option(0, "after a save, delete all but this many of the newest checkpoints; 0: keep all")
    max_failed_saves: int = option(3, "end when this many saves in a row have failed")
    timeout: float = option(600.0, "seconds that a rank waits for the others, to meet and in a step, before it ends")
    export: str = option("", "directory, .pt or .safetensors file, or URL of one, for the averaged weights at the end")
    parallel: str = option("zero", "how the ranks share the model; see parallel.py", choices=MODES)
    resume: str = option(
        "auto",
        "'auto': go on from the newest in --checkpoint-dir, if any; 'fallback': from the newest that is not damaged; "
        "or the URL of a checkpoint",
    )


def parse_args(argv: Sequence[str] | None = None) -> Args:
    """The command line, checked, as a value that nothing changes any more."""
    parser = Parser(
        description=DESCRIPTION,
        epilog=f"Exit status: 0 when the last step is done; {PREEMPTED} when a signal has stopped the run before it.",
    )
    for f in dataclasses.fields(Args):
        kind: dict[str, Any] = {} if "nargs" in f.metadata else {"type": type(f.default)}
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, **kind, **f.metadata)
    args = Args(**vars(parser.parse_args(argv)))
    if math.isnan(args.lr):
        args = dataclasses.replace(args, lr=LEARNING_RATE[args.model])
    counts = ("width", "layers", "heads", "max_bytes", "held_out_bytes", "length", "batch", "steps")
    for name in (*counts, "eval_every", "checkpoint_every", "max_failed_saves"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not 1 <= args.timeout <= MAX_TIMEOUT:  # not: NaN
        parser.error(f"--timeout must be at least 1 and at most {MAX_TIMEOUT}")
    limits = {
        "lr": math.inf,
        "lambd": math.inf,
        "t0": None,
        "clip": None,
        "dropout": 1,
        "seed": 2**63,
        "verify_every": None,
        "keep_last": None,
    }
    for name, limit in limits.items():
        value = getattr(args, name)
        if not value >= 0 or (limit is not None and value >= limit):  # not: NaN
            parser.error(
                f"--{name.replace('_', '-')} must be at least 0" + ("" if limit is None else f" and less than {limit}")
            )
    if not args.out or "" in args.data:
        parser.error("--out and --data must not be empty")
    if args.held_out_bytes <= args.length:
        parser.error("--held-out-bytes must be more than --length")
    if args.model == "gpt" and args.width % args.heads:
        parser.error("--width must be a multiple of --heads")
    if args.model == "lstm" and "tp" in args.parallel:
        parser.error(f"--model lstm cannot be cut for --parallel {args.parallel}: take another")
    return args
