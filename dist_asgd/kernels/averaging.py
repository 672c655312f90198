"""Moves averages towards parameters that something else has updated, wherever those lie in memory."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dist_asgd.asgd.rule import average_step_
from dist_asgd.kernels.tensor_list import TensorList


def move_averages_(parts: TensorList, averages: Sequence[Tensor], mus: Sequence[float]) -> None:
    """Moves each of ``averages`` in place towards ``parts`` by its ``mu``, with the bits of ``average_step_``.

    Args:
        parts: parameters, which are only read.
        averages: 1-D and real; element ``starts[i] + j`` of each belongs to element ``j`` of part ``i``.
        mus: one for each average; 1 makes it the parameters, 0 leaves it as it is.
    """
    for average, mu in zip(averages, mus, strict=True):
        for part, start in zip(parts.tensors, parts.starts if mu else (), strict=False):
            average_step_(average[start : start + len(part)], part, mu)
