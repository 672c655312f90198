"""Trains a byte-level language model with ShardedASGD, and shows what averaging is worth.

    python launch/train.py                                            # one process
    torchrun --nproc-per-node 2 launch/train.py --out runs/a --checkpoint-dir runs/a/checkpoints
    torchrun --nproc-per-node 3 launch/train.py --out runs/a --checkpoint-dir runs/a/checkpoints    # goes on from there

There is no DistributedDataParallel: the optimizer averages the gradients over the ranks while backward runs, each rank
updates its share of the parameters, and the shares are gathered again. `--parallel` has other ways, to the same result.
The learning rate is high and stays high, so the weights wander round a minimum. From step `--t0` on two averages are
kept, which are nearer to it than the weights are: the uniform one of all iterates, and a recent one, which forgets old
iterates.

Beside this file: data.py (the text), model.py, world.py (the ranks), parallel.py (what each has of the model), and
report.py (metrics and plot).
"""

import contextlib
import dataclasses
import functools
import logging
import math
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.tensor import DTensor

import data
import dist_asgd
from dist_asgd import EMA, Checkpointer, ShardedASGD, Uniform
from dist_asgd.checkpoint import CheckpointError, DamagedCheckpoint
from dist_asgd.checkpoint.errors import RankUnresponsive
from dist_asgd.checkpoint.storage.retry import RETRY_TIMEOUT
from dist_asgd.checkpoint.storage.url import without_credentials
from dist_asgd.cli.arguments import Parser
from model import build_model
from operator_metrics import OperatorMetrics
from parallel import MODES, Layout, layout_of
from report import Metrics, import_drivers, make_folders
from world import PREEMPTED, StopSignal, World, join_world, log_with_rank

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

logger = logging.getLogger("dist_asgd.train")

AVERAGES = ("uniform", "recent")
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
        description=(__doc__ or "").partition("\n")[0],
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


def train_step(run: Run, step: int) -> Tensor:
    """One step on this rank's share of the global batch; returns the sum of the share's losses, 0-d fp64."""
    args, layout = run.args, run.layout
    share = data.rank_share(args.batch, layout.data_rank, layout.data_size)
    x, y = data.sequences(run.text.train, share, seed=args.seed, step=step, length=args.length)  # (b, T) each
    # Dropout is drawn anew for each step and share: a resumed run draws what it would have drawn without a stop.
    torch.manual_seed(random.Random(f"{args.seed} {step} rank {layout.data_rank}").getrandbits(60))
    loss = next_byte_loss(run, x, y, "mean")
    # Gradients become the mean over shares. Where the batch does not divide by them, they differ in size (16 over 3
    # ranks: 5, 5, 6). So that each sequence counts alike, a rank's loss is weighted by its part of the batch.
    (loss * (layout.data_size * len(share) / args.batch)).backward()
    run.optimizer.clip_grad_norm_(args.clip)
    run.optimizer.step()
    run.optimizer.zero_grad()
    return loss.detach().double() * len(share)


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


def say(world: World, text: str) -> None:
    """Print a line, once, above the progress bar."""
    if world.rank == 0:
        (print if tqdm is None else tqdm.write)(text)
        sys.stdout.flush()  # at once, also where it is a file


def remaining_steps(run: Run, done: int) -> Iterator[int]:
    """The numbers of the steps to do; on rank 0, at a terminal, with a progress bar."""
    steps = range(done + 1, run.args.steps + 1)
    if tqdm is None:
        say(run.world, "tqdm is not installed, so there is no progress bar: pip install 'dist-asgd[train]'")
        return iter(steps)
    disable = True if run.world.rank else None  # None: at a terminal it is shown, in a log it is not
    return iter(tqdm(steps, initial=done, total=run.args.steps, unit="step", disable=disable))


def resume(run: Run) -> Progress:
    """Load the checkpoint to go on from, if there is one."""
    facts: dict[str, Any] = {"identity": {}, "progress": {}}  # empty ones take what was saved
    if not load(run, facts):
        return Progress()
    for name, value in run.identity().items():
        if (other := facts["identity"].get(name)) != value:
            raise SystemExit(
                f"The checkpoint is of a run with {name} = {other}, and this one has {value}. "
                "Take the same, or another --checkpoint-dir."
            )
    newest = run.world.from_rank_zero(lambda: run.checkpointer and run.checkpointer.latest())
    if run.args.resume != "fallback" and newest is not None and newest > facts["progress"]["step"]:
        raise SystemExit(
            f"{without_credentials(run.args.checkpoint_dir)} has a later checkpoint than "
            f"{without_credentials(run.args.resume)}, and would be resumed from that "
            "one the next time: take another --checkpoint-dir."
        )
    # The facts again: where damage is found in the model only, they come from an older checkpoint now, as the model.
    state: dict[str, Any] = {"model": run.model, "optimizer": run.optimizer, "identity": {}, "progress": {}}
    load(run, state)
    saved_by = state["progress"].pop("world_size")
    progress = Progress(**state["progress"])
    say(run.world, f"Going on from step {progress.step}, saved by {saved_by} ranks")
    if run.world.rank:
        progress.losses = 0.0  # rank 0 has those of all ranks together
    return progress


def load(run: Run, state: dict[str, Any]) -> bool:
    """Fill `state` from the checkpoint to go on from; False if there is none."""
    if run.args.resume not in ("auto", "fallback"):
        dist_asgd.load(run.args.resume, state)
        return True
    if run.checkpointer is None:
        return False
    try:
        return run.checkpointer.load(state, fallback=run.args.resume == "fallback") is not None
    except DamagedCheckpoint as error:
        ways = "Take the URL of another checkpoint for --resume"
        if run.args.resume == "auto":
            ways += ", or --resume fallback, which goes on from the newest that is not damaged"
        raise SystemExit(f"The checkpoint is damaged: {error}\n{ways}.") from error


def save(run: Run, progress: Progress) -> None:
    """Save a checkpoint, if there is a place for it."""
    if run.checkpointer is not None:
        started = time.monotonic()
        facts = {**dataclasses.asdict(progress), "losses": run.layout.sum(float(progress.losses))[0]}
        facts["world_size"] = run.world.size
        state = {"model": run.model, "optimizer": run.optimizer, "progress": facts, "identity": run.identity()}
        url = run.checkpointer.save(progress.step, state)
        say(run.world, f"Saved step {progress.step} in {time.monotonic() - started:.1f} s: {url}")


def write_metrics(run: Run, metrics: Metrics, record: dict[str, Any]) -> None:
    """Write a record, or say why that failed; the next one that is written brings it. Raises at the last step only."""
    try:
        metrics.add(record)
    except OSError as error:  # has no credentials in its text
        if record["step"] == run.args.steps:
            raise
        say(run.world, f"metrics.jsonl was not written, and will be with the next record: {error}")


class Watched:
    """Publishes what a run is doing for its operator. Collective when it is made; then rank 0 alone writes."""

    def __init__(self, run: Run, progress: Progress) -> None:
        self._run, self._progress = run, progress
        self._step, self._time = progress.step, time.monotonic()
        self._metrics: OperatorMetrics | None = None
        run.world.from_rank_zero(self._open)

    def _open(self) -> None:
        args = self._run.args
        if args.metrics_file or args.tensorboard:
            self._metrics = OperatorMetrics(args.metrics_file, args.tensorboard)

    @contextlib.contextmanager
    def afterwards(self) -> Iterator[None]:
        """Writes after the block, also where it raises."""
        try:
            yield
        finally:
            self.write()

    def write(self, **numbers: float) -> None:
        """Writes the numbers given beside those of the optimizer and the checkpointer. A failure is logged."""
        if self._metrics is None:
            return
        run, step, now = self._run, self._progress.step, time.monotonic()
        if step > self._step:
            rate = (step - self._step) / (now - self._time)
            numbers |= {"steps_per_second": rate, "tokens_per_second": rate * run.args.batch * run.args.length}
            self._step, self._time = step, now
        counts = run.checkpointer.metrics() if run.checkpointer else {}
        try:
            self._metrics.write({**run.optimizer.metrics(), **counts, "ranks": run.world.size, **numbers}, step)
        except OSError as error:
            logger.warning("the metrics of step %d were not written, and will be with the next ones: %s", step, error)


def held_out(record: dict[str, Any]) -> dict[str, float]:
    """Returns the losses of a record by their keys in OperatorMetrics."""
    averages = {f"bits_per_byte/{name}": record[name] for name in AVERAGES}
    return {"bits_per_byte": record["raw"], "train": record["train"], **averages}


def save_or_go_on(run: Run, progress: Progress, failed: int) -> int:
    """Save a checkpoint, or say why that failed and leave it to the next interval.

    Args:
        failed: how many saves before this one have failed in a row.

    Returns:
        How many have failed in a row now.

    Raises:
        CheckpointError: --max-failed-saves is reached, or a rank does not answer. On every rank.
    """
    try:
        save(run, progress)
        return 0
    except RankUnresponsive:
        raise  # the next step could not be done either
    except CheckpointError as error:
        failed, most = failed + 1, run.args.max_failed_saves
        if failed >= most:
            raise CheckpointError(
                f"The training ends after step {progress.step}, because {failed} saves in a row have failed "
                f"(--max-failed-saves {most}); the last one: {error}"
            ) from error
        say(run.world, f"Saving step {progress.step} failed ({failed} of at most {most} in a row): {error}")
        return failed


def save_last(run: Run, progress: Progress) -> None:
    """Save the checkpoint that a run ends with. A CheckpointError says that what was done since the last is lost."""
    try:
        save(run, progress)
    except RankUnresponsive:
        raise
    except CheckpointError as error:
        raise CheckpointError(
            f"The training ends after step {progress.step}, and this step could not be saved; "
            f"the same command goes on from the newest checkpoint before it, if there is one: {error}"
        ) from error


def train(run: Run, stop: StopSignal) -> bool:
    """Train from the newest checkpoint to the last step, or until a signal; returns whether the last step is done."""
    args, world = run.args, run.world
    progress = resume(run)
    metrics = world.from_rank_zero(lambda: Metrics(args.out, progress.step))
    watched = Watched(run, progress)
    watched.write(preempted=0, finished=0)
    log_with_rank(world, lambda: progress.step)
    failed = 0  # saves in a row
    for step in remaining_steps(run, progress.step):
        progress.losses += train_step(run, step)
        progress.seen += args.batch
        progress.step = step
        if step % args.eval_every == 0 or step == args.steps:
            record = evaluate(run, progress)
            world.from_rank_zero(functools.partial(write_metrics, run, metrics, record))
            watched.write(**held_out(record))
        stopping = stop.asked(world) and step < args.steps
        if stopping or step == args.steps:
            with watched.afterwards():
                save_last(run, progress)
        elif step % args.checkpoint_every == 0:
            with watched.afterwards():
                failed = save_or_go_on(run, progress, failed)
        if stopping:
            watched.write(preempted=1)
            kept = "" if run.checkpointer else " Nothing was saved: there is no --checkpoint-dir."
            say(world, f"Stopped by a signal after step {step}.{kept}")
            return False
    watched.write(finished=1)
    say(world, world.from_rank_zero(metrics.plot))
    if args.export:
        with run.optimizer.averaged_parameters("recent"):
            dist_asgd.export(args.export, run.model)
        say(world, f"Exported the recent average of step {progress.step}: {without_credentials(args.export)}")
    return True


@record  # torchrun shows the error of the rank that failed first
def main(argv: Sequence[str] | None = None) -> None:
    """One rank, from start to end."""
    args = parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would wait for the other ranks to come
    import_drivers(args.out, args.checkpoint_dir)
    world = join_world(args.timeout)
    log_with_rank(world, lambda: 0)
    stop = StopSignal()  # not before: until the ranks have met, a signal ends the process at once
    with world.ended_with_others():
        world.from_rank_zero(lambda: make_folders(args.out, args.checkpoint_dir))
        run = build_run(args, world)
        size = sum(p.numel() for p in run.model.parameters())
        say(world, f"{args.model} of {size:,} parameters, {len(run.text.train):,} bytes of text to train on")
        ranks = f"{world.size} × {world.device.type}, --parallel {args.parallel}"
        say(world, f"{ranks}, {args.batch} sequences of {args.length} bytes a step in all")
        finished = train(run, stop)
    world.close()
    stop.ignore()
    if not finished:
        sys.exit(PREEMPTED)


if __name__ == "__main__":
    main()
