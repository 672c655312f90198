"""Trains a byte-level language model with ShardedASGD, and shows what averaging is worth.

    python launch/train.py                                            # one process
    torchrun --nproc-per-node 2 launch/train.py --out runs/a --checkpoint-dir runs/a/checkpoints
    torchrun --nproc-per-node 3 launch/train.py --out runs/a --checkpoint-dir runs/a/checkpoints    # goes on from there

There is no DistributedDataParallel: the optimizer averages the gradients over the ranks while backward runs, each rank
updates its share of the parameters, and the shares are gathered again. `--parallel` has other ways, to the same result.
The learning rate is high and stays high, so the weights wander round a minimum. From step `--t0` on two averages are
kept, which are nearer to it than the weights are: the uniform one of all iterates, and a recent one, which forgets old
iterates.

Beside this file: arguments.py (the command line), data.py (the text), model.py, world.py (the ranks), parallel.py (what
each has of the model), run.py (all of these), evaluation.py, checkpoints.py, console.py, report.py (metrics and plot)
and operator_metrics.py.
"""

import functools
import random
import signal
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

import data
import dist_asgd
from arguments import parse_args
from checkpoints import resume, save_last, save_or_go_on
from console import remaining_steps, say
from dist_asgd.checkpoint.storage.url import without_credentials
from evaluation import evaluate, held_out
from operator_metrics import Watched
from report import Metrics, import_drivers, make_folders
from run import Run, build_run, next_byte_loss
from world import PREEMPTED, StopSignal, join_world, log_with_rank


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


def write_metrics(run: Run, metrics: Metrics, record: dict[str, Any]) -> None:
    """Write a record, or say why that failed; the next one that is written brings it. Raises at the last step only."""
    try:
        metrics.add(record)
    except OSError as error:  # has no credentials in its text
        if record["step"] == run.args.steps:
            raise
        say(run.world, f"metrics.jsonl was not written, and will be with the next record: {error}")


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
