"""Refusal to save what ranks have computed in different steps, for optimizers whose steps the ranks do not compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from dist_asgd.checkpoint.errors import CheckpointError

# The global ranks of an optimizer, and a number that is equal on these ranks if they have taken the same steps.
StepsTaken = tuple[tuple[int, ...], int]


@runtime_checkable
class CountsSteps(Protocol):
    """An optimizer that can tell which steps it has taken, for ranks to compare."""

    def steps_taken(self) -> StepsTaken:
        """Returns the ranks of the optimizer, and a fingerprint of the steps that this rank has taken."""


def require_same_steps(
    everyone: Sequence[Mapping[str, StepsTaken]], latest: Callable[[], int | None] | None = None
) -> None:
    """Raises ``CheckpointError`` where ranks of one optimizer have taken different steps.

    Args:
        everyone: what each rank's optimizers have taken, by their keys in the state.
        latest: returns the step of the newest checkpoint, or None if there is none; called for the message.
    """
    first: dict[tuple[str, tuple[int, ...]], tuple[int, int]] = {}
    for rank, optimizers in enumerate(everyone):
        for key, (ranks, taken) in optimizers.items():
            other, expected = first.setdefault((key, ranks), (rank, taken))
            if taken != expected:
                raise CheckpointError(
                    f"{key}: ranks {other} and {rank} took different steps: one of them left out a step(), had another "
                    "lr or other gradients in it, or wrote to optimizer.state. What they have computed does not belong "
                    f"together, so it is not saved. {_last_good(latest)}"
                )


def _last_good(latest: Callable[[], int | None] | None) -> str:
    if latest is None:
        return "Load an earlier checkpoint"
    step = latest()
    return "There is no earlier checkpoint" if step is None else f"The last good checkpoint is that of step {step}"
