"""Numbers for loggers: what ``ShardedASGD.metrics`` and ``ShardedAverages.metrics`` return.

A key is a word, such as ``mu``. Where there are several averages, ``/<name>`` of the average follows the words that are
of one average; for param groups other than the first, ``/<number>`` ends the key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
import torch.distributed as dist

from dist_asgd.asgd.schedule import Hyperparameters, Scalars, current_scalars
from dist_asgd.buckets.base import ParameterBucket
from dist_asgd.step.clip import total_norm
from dist_asgd.step.validation import Groups

Metrics: TypeAlias = dict[str, float]  # counts are ints

DISTANCE = "metrics(distance=True)"  # name of the collective operation


def optimizer_metrics(
    groups: Groups, buckets: Sequence[Sequence[ParameterBucket]], suffixes: Mapping[str, str]
) -> Metrics:
    """Returns ``lr``, ``eta``, ``mu`` and ``step`` of each param group, and ``averaging``. Sends nothing.

    Args:
        groups: ``optimizer.param_groups``.
        buckets: the buckets of each group.
        suffixes: the suffix of each average in the state, by its name.
    """
    found: Metrics = {}
    for number, (group, of_group) in enumerate(zip(groups, buckets, strict=True)):
        h = Hyperparameters.of(group)
        scalars = current_scalars(h, furthest(of_group, len(suffixes)))
        numbers = {"lr": float(h.lr), "eta": scalars.eta, "step": scalars.step}
        found |= {_key(word, number=number): value for word, value in numbers.items()} | _mus(scalars, suffixes, number)
    return found | averaging([bucket for of_group in buckets for bucket in of_group], suffixes)


def averages_metrics(
    updates: Sequence[int], buckets: Sequence[Sequence[ParameterBucket]], suffixes: Mapping[str, str]
) -> Metrics:
    """Returns ``updates`` and ``mu`` for each optimizer that is followed, and ``averaging``. Sends nothing.

    Args:
        updates: the updates that followed each optimizer.
        buckets: the buckets of the parameters of each optimizer.
        suffixes: the suffix of each average in the state, by its name.
    """
    found: Metrics = {}
    for number, (count, followed) in enumerate(zip(updates, buckets, strict=True)):
        found |= {_key("updates", number=number): count} | _mus(furthest(followed, len(suffixes)), suffixes, number)
    return found | averaging([bucket for followed in buckets for bucket in followed], suffixes)


@torch.no_grad()
def distances(
    buckets: Sequence[ParameterBucket], suffixes: Mapping[str, str], group: dist.ProcessGroup | None
) -> Metrics:
    """Returns the 2-norm of the difference between all parameters and each average, as ``distance``. Collective.

    Args:
        buckets: all buckets, whose parameters are complete.
        suffixes: the suffix of each average in the state, by its name.
        group: the ranks; None for one rank.
    """
    counted = [bucket for bucket in buckets if bucket.is_counted]
    device = next((bucket.device for bucket in buckets), torch.device("cpu"))
    found: Metrics = {}
    for name, suffix in zip(_names(suffixes), suffixes.values(), strict=True):
        parts = [part for bucket in counted for part in bucket.shard.distance_parts(suffix)]
        found[_key("distance", name)] = total_norm(parts, 2.0, device, group).item()
    return found


def averaging(buckets: Sequence[ParameterBucket], suffixes: Mapping[str, str]) -> Metrics:
    """Returns, as ``averaging``, 1 if an average of any parameter is kept, and 0 otherwise."""
    begun = any(bucket.shard.has_average(suffix) for bucket in buckets for suffix in suffixes.values())
    return {"averaging": int(begun)}


def furthest(buckets: Sequence[ParameterBucket], averages: int) -> Scalars:
    """Returns the scalars of the parameter that has taken the most steps; of no step where there is no parameter."""
    found = [scalars for bucket in buckets if (scalars := bucket.furthest()) is not None]
    return max(found, key=lambda scalars: scalars.step, default=Scalars(0, 0.0, (1.0,) * averages))


def _mus(scalars: Scalars, suffixes: Mapping[str, str], number: int) -> Metrics:
    return {_key("mu", name, number): mu for name, mu in zip(_names(suffixes), scalars.mus, strict=True)}


def _names(suffixes: Mapping[str, str]) -> list[str]:
    """Returns the names of the averages as keys have them: an only one is not named."""
    return list(suffixes) if len(suffixes) > 1 else [""]


def _key(word: str, average: str = "", number: int = 0) -> str:
    return "/".join(filter(None, [word, average, str(number or "")]))
