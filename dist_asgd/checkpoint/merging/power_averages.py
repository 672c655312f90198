"""Makes the average of another width out of stored power averages, after the training.

Karras et al., "Analyzing and improving the training dynamics of diffusion models" (EDM2), 2024: a power average is a
weighted mean of all iterates, with a profile that only gamma and the number of iterates determine. So a power average
of any width is, by least squares over profiles, a combination of power averages that were stored at several steps.
EDM2 gives the inner products of profiles in the limit of many iterates. Here they are sums over iterates, which hold
for few ones, too. The profile of ``PolynomialDecay(gamma)`` after n iterates gives iterate i the weight
(gamma + 1) Gamma(i + gamma) / Gamma(i) * Gamma(n) / Gamma(n + 1 + gamma).
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_asgd.averages.options import AVERAGE, FIRST, PROGRESS
from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.export.formats import Exported
from dist_asgd.checkpoint.export.from_checkpoint import ExportSource
from dist_asgd.checkpoint.format.json_values import decode
from dist_asgd.checkpoint.format.manifest import Manifest
from dist_asgd.checkpoint.state.tree import Path, key_of

WIDEST = 1 / math.sqrt(12)  # the width of the uniform mean, whose gamma is 0
NARROWEST = 1e-4  # its gamma is about 10,000
RIDGE = 1e-10  # keeps weights small that would amplify the rounding of the stored averages
ITERATES = 2**15  # whose weights are computed at once

_KIND = re.compile(r"(?:(\w+)=)?PolynomialDecay\(every=(\d+), gamma=([0-9.e+-]+)\)")


@dataclass(frozen=True, slots=True)
class Profile:
    """A power average of the first ``count`` iterates."""

    gamma: float
    count: int  # of the iterates that it takes
    every: int = 1  # it takes one step of so many as an iterate


def power_averages(source: ExportSource) -> dict[str, Profile]:
    """Returns the power averages (``PolynomialDecay``) of a checkpoint by name, ``ShardedASGD``'s and others'.

    Raises:
        CheckpointError: there is none, it has not begun, or parameters have taken different numbers of iterates.
    """
    found = {**_of_optimizers(source), **_of_model_averages(source.manifest)}
    if not found:
        raise CheckpointError(
            "the checkpoint has no averages of the kind PolynomialDecay(gamma), of which others can be made: "
            "ShardedASGD or ShardedAverages has to keep two of them, such as PolynomialDecay(6.94) and "
            "PolynomialDecay(16.97), and be saved by dist_asgd"
        )
    return found


def _of_optimizers(source: ExportSource) -> dict[str, Profile]:
    """Returns the power averages that optimizers keep; their kinds are text in the param groups."""
    kinds = {
        (value.path[:-3], found[1] or FIRST): (int(found[2]), float(found[3]))
        for key, value in source.manifest.values.items()
        if value.path[-1] == "average" and value.path[-3:-2] == ("param_groups",)
        for found in _KIND.finditer(str(decode(value.encoded, key)))
    }
    counts = {optimizer: _steps_averaged(source, optimizer) for optimizer, _ in kinds}
    return {name: _profile(gamma, counts[optimizer], every) for (optimizer, name), (every, gamma) in kinds.items()}


def _of_model_averages(manifest: Manifest) -> dict[str, Profile]:
    """Returns the power averages of every ``ShardedAverages``, which has their kinds and counts as plain data."""
    values = {
        value.path: decode(value.encoded, key)
        for key, value in manifest.values.items()
        if PROGRESS in value.path and value.rank is None
    }
    kinds = {
        (path[:-3], str(path[-1])): found
        for path, kind in values.items()
        if path[-3:-1] == (PROGRESS, "kinds") and (found := _KIND.fullmatch(str(kind)))
    }
    counts = {averages: _iterates(values, averages) for averages, _ in kinds}
    return {
        name: _profile(float(found[3]), counts[averages], int(found[2])) for (averages, name), found in kinds.items()
    }


def _profile(gamma: float, steps: int, every: int) -> Profile:
    """Returns the profile after ``steps`` steps, of which the average takes the first and each ``every``-th after."""
    return Profile(gamma, (steps - 1) // every + 1, every)


def _iterates(values: Mapping[Path, Any], averages: Path) -> int:
    """Returns the number of iterates of all parameters and buffers of the ``ShardedAverages`` at this path."""
    size = len(averages) + 1
    progress = {path[size:]: value for path, value in values.items() if path[:size] == (*averages, PROGRESS)}
    counts = {int(progress.get(("iterates",), 0))}
    counts |= {int(count) for path, count in progress.items() if path[:1] == ("others",) and path[1:]}
    if any(path[:1] == ("treatment",) and treated == AVERAGE for path, treated in progress.items()):
        counts.add(int(progress.get(("buffers",), 0)))
    return _the_count(averages, counts)


def _the_count(owner: Path, counts: set[int]) -> int:
    if len(counts) != 1:
        raise CheckpointError(
            f"parameters or buffers of {key_of(owner)!r} have taken different numbers of iterates into their averages: "
            f"{sorted(counts)}. Averages are combined where all are over equally many"
        )
    if (count := next(iter(counts))) < 1:
        raise CheckpointError(f"{key_of(owner)!r} has not begun to average")
    return count


def _steps_averaged(source: ExportSource, optimizer: Path) -> int:
    """Returns the number of steps since averaging began, that of the first iterate included."""
    size = len(optimizer)
    starts = {
        float(decode(value.encoded, key))
        for key, value in source.manifest.values.items()
        if value.path[:size] == optimizer and value.path[-1] == "t0" and value.path[size] == "param_groups"
    }
    steps = _numbers(source, optimizer, "step")
    return _the_count(optimizer, {math.ceil(step - 1 - start) for step in steps for start in starts})


def _numbers(source: ExportSource, optimizer: Path, name: str) -> set[float]:
    """Returns the different values of an entry, a tensor without dims, in the state of all parameters."""
    tensors = [
        Exported(key, key, (), torch.float64)
        for key, record in source.manifest.tensors.items()
        if record.path[: len(optimizer) + 1] == (*optimizer, "state") and record.path[-1] == name
        if record.saved.shape == ()
    ]
    return {struct.unpack("<d", data)[0] for _, data in source.payloads(tensors)} if tensors else set()


def gamma_of_width(width: float) -> float:
    """Returns the gamma of the power average whose standard deviation is ``width`` times the length of the training.

    Solves width = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)).
    """
    low, high = 0.0, 1 / NARROWEST**2
    for _ in range(200):
        middle = (low + high) / 2
        if math.sqrt(middle + 1) / ((middle + 2) * math.sqrt(middle + 3)) > width:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def check_width(width: Any) -> float:
    """Returns the width as a float. Raises ``ValueError`` or ``TypeError`` if no power average has it."""
    if not isinstance(width, int | float) or isinstance(width, bool):
        raise TypeError(f"ema_width must be a number, got {width!r}")
    if not NARROWEST <= width < WIDEST:
        raise ValueError(
            f"ema_width must be in [{NARROWEST}, {WIDEST:.4f}), a share of the training's length such as 0.05, got "
            f"{width!r}; that of the uniform mean is {WIDEST:.4f}"
        )
    return float(width)


def combine(profiles: Sequence[Profile], target: Profile) -> tuple[list[float], float]:
    """Returns the weights by which ``profiles`` make up ``target`` best, which add up to 1, and the error that is left.

    The error is the norm of the difference of the weights of all iterates, relative to the norm of those of ``target``.
    """
    everything = [*profiles, target]
    products = torch.zeros(len(everything), len(everything), dtype=torch.float64, device="cpu")
    last = max(profile.count for profile in everything)
    for first in range(1, last + 1, ITERATES):
        iterates = torch.arange(first, min(first + ITERATES, last + 1), dtype=torch.float64, device="cpu")
        weights = torch.stack([_weights(profile, iterates) for profile in everything])
        products += weights @ weights.T
    norms = products.diagonal().sqrt()
    cosines = products / norms.outer(norms)  # between profiles
    ridge = RIDGE * torch.eye(len(profiles), dtype=torch.float64, device="cpu")
    solution = torch.linalg.solve(cosines[:-1, :-1] + ridge, cosines[:-1, -1]) * norms[-1] / norms[:-1]
    solution /= solution.sum()
    signed = torch.cat([solution, -torch.ones(1, dtype=torch.float64, device="cpu")])
    error = (signed @ products @ signed).clamp(min=0).sqrt() / norms[-1]
    return solution.tolist(), float(error)


def _weights(profile: Profile, iterates: Tensor) -> Tensor:
    """Returns the weights of ``iterates``, given by their numbers from 1 on, in a power average; 1-D, float64."""
    gamma, count = profile.gamma, profile.count
    rest = math.log(gamma + 1) + math.lgamma(count) - math.lgamma(count + 1 + gamma)
    logarithms = torch.lgamma(iterates + gamma) - torch.lgamma(iterates) + rest
    return torch.where(iterates <= count, logarithms.exp(), 0.0)
