"""The checkpoints of a run: from which it goes on, and what happens where one cannot be saved."""

import dataclasses
import time
from typing import Any

import dist_asgd
from console import say
from dist_asgd.checkpoint import CheckpointError, DamagedCheckpoint
from dist_asgd.checkpoint.errors import RankUnresponsive
from dist_asgd.checkpoint.storage.url import without_credentials
from run import Progress, Run


def resume(run: Run) -> Progress:
    """Load the checkpoint to go on from, if there is one."""
    state: dict[str, Any] = {"identity": {}, "progress": {}}  # empty ones take what was saved
    try:
        found = load(run, state | {"model": run.model, "optimizer": run.optimizer})
    except RankUnresponsive:
        raise
    except CheckpointError:  # maybe since it is of another run, which says more
        load(run, state)
        check_identity(run, state["identity"])
        raise
    if not found:
        return Progress()
    check_identity(run, state["identity"])
    newest = run.world.from_rank_zero(lambda: run.checkpointer and run.checkpointer.latest())
    if run.args.resume != "fallback" and newest is not None and newest > state["progress"]["step"]:
        raise SystemExit(
            f"{without_credentials(run.args.checkpoint_dir)} has a later checkpoint than "
            f"{without_credentials(run.args.resume)}, and would be resumed from that "
            "one the next time: take another --checkpoint-dir."
        )
    saved_by = state["progress"].pop("world_size")
    progress = Progress(**state["progress"])
    say(run.world, f"Going on from step {progress.step}, saved by {saved_by} ranks")
    if run.world.rank:
        progress.losses = 0.0  # rank 0 has those of all ranks together
    return progress


def check_identity(run: Run, saved: dict[str, Any]) -> None:
    """Raise if what may not change has changed since the checkpoint was saved."""
    for name, value in run.identity().items():
        if (other := saved.get(name)) != value:
            raise SystemExit(
                f"The checkpoint is of a run with {name} = {other}, and this one has {value}. "
                "Take the same, or another --checkpoint-dir."
            )


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
