"""What a run prints: lines, and a progress bar under them."""

import sys
from collections.abc import Iterator

from run import Run
from world import World

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


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
