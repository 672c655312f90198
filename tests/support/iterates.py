"""The oracle of `ShardedAverages`: the recursion of averages over whole iterates, on one process."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dist_asgd.averages.kinds import Average

Iterate = Mapping[str, Tensor]  # whole parameters by name


def averaged(iterates: Sequence[Iterate], kind: Average, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The average of whole iterates by `ax += (p - ax) * mu`, each operation rounded once."""
    result: dict[str, Tensor] = {}
    for number, iterate in enumerate(iterates):
        mu = kind.mu(number, -1)  # the first is number 0
        for name, value in iterate.items():
            wide = value.to(dtype or torch.promote_types(value.dtype, torch.float32))
            if mu == 1:
                result[name] = wide.clone()
            else:
                ax = result[name]
                result[name] = ax + (wide - ax) * mu
    return result


def mean(iterates: Sequence[Iterate]) -> dict[str, Tensor]:
    """The mean of whole iterates in fp64."""
    return {name: torch.stack([it[name].double() for it in iterates]).mean(0) for name in iterates[0]}
