"""Weights of the sources of a merge: uniform, given, or those by which a mean stands for a decay of the learning rate.

Let theta_0, ..., theta_k be checkpoints of a training at a constant learning rate. Had the update to theta_i been
scaled by w_i, 1 >= w_1 >= ... >= w_k >= 0, the training would have ended, to first order, at the mean with the weights
c_0 = 1 - w_1, c_j = w_j - w_{j+1} and c_k = w_k (WSM, arXiv 2507.17634; PMA, arXiv 2505.12082). Here w_i is the shape
of the decay at i / (k + 1), so that the decay begins at theta_0 and would reach 0 one distance after theta_k.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

DECAYS: dict[str, Callable[[float], float]] = {  # by name: from 1 at 0 to 0 at 1
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}


def check_weights(weights: object) -> list[float]:
    """Returns given weights as floats. They may be negative and need not add up to 1.

    Raises:
        ValueError, TypeError: ``weights`` has something that is no finite number, or adds up to 0.
    """
    if isinstance(weights, str | bytes) or not isinstance(weights, Sequence):
        raise TypeError(f"weights must be a list of numbers, one for each checkpoint, got {weights!r}")
    for weight in weights:
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not math.isfinite(weight):
            raise ValueError(f"weights must be finite numbers, got {weight!r}")
    found = [float(weight) for weight in weights]
    total = math.fsum(found)
    if not math.isfinite(total) or abs(total) <= 1e-9 * math.fsum(map(abs, found)):
        raise ValueError(f"weights add up to {total}: a mean divides by their sum, which must not be 0, nor infinite")
    return found


def decay_weights(shape: str, count: int) -> list[float]:
    """Returns the weights of ``count`` equally distant checkpoints, in the order of training; they add up to 1.

    Args:
        shape: a key of DECAYS.
    """
    decay = DECAYS[shape]
    return [decay(number / count) - decay((number + 1) / count) for number in range(count)]


def check_distances(steps: Sequence[int | None]) -> None:
    """Raises ``ValueError`` where the steps of checkpoints that a decay weights are known and not equally distant."""
    known = [step for step in steps if step is not None]
    distances = {after - before for before, after in itertools.pairwise(known)}
    if len(steps) < 2:
        raise ValueError("a decay takes at least two checkpoints, in the order of training")
    if len(known) == len(steps) and (len(distances) > 1 or min(distances) <= 0):
        raise ValueError(
            f"a decay takes checkpoints at equal distances, in the order of training, got steps {known[:20]}: select "
            "others, or give weights"
        )
