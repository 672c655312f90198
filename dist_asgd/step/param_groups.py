"""Adds param groups to an optimizer, each one completely or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dist_asgd._torch_private import add_param_group
from dist_asgd.averages.options import check_average
from dist_asgd.buckets.base import BucketOptions
from dist_asgd.comm.consensus import Agreement
from dist_asgd.step.consistency import argument_facts
from dist_asgd.step.cuda_graphs import check_capturable
from dist_asgd.step.validation import check_aliases, check_last_group, drop_duplicates


def add_checked(
    optimizer: Optimizer, param_group: dict[str, Any], setting: BucketOptions, agreement: Agreement
) -> None:
    """Adds a param group on this rank after torch's checks and the package's own.

    Raises:
        ValueError, TypeError: where a check fails; nothing is added then.
    """
    groups = optimizer.param_groups
    count = len(groups)
    try:
        add_param_group(optimizer, param_group)
        drop_duplicates(groups[-1])
        check_last_group(groups, agreement.ranks)
        check_average(groups[-1], count, setting.averages)
        check_capturable(groups[-1], count, setting.precision, agreement.world_size)
    except BaseException:
        del groups[count:]
        raise


def add_agreed(
    optimizer: Optimizer,
    param_group: dict[str, Any],
    setting: BucketOptions,
    agreement: Agreement,
    arguments: Mapping[str, object],
    module: nn.Module | None,
) -> None:
    """Adds a param group on every rank, or on none. Collective.

    Args:
        arguments: the arguments of the optimizer that must be equal on every rank.
        module: the model; None if the optimizer was not given one.

    Raises:
        ValueError, TypeError: the same on every rank, where a check fails on a rank or ranks add different groups.
    """
    first = len(optimizer.param_groups)
    try:
        with agreement.together("add_param_group()"):
            add_checked(optimizer, param_group, setting, agreement)
            check_aliases(optimizer.param_groups[first:], str(arguments["gradients"]), module)
            facts = argument_facts(arguments, optimizer.param_groups, first)
        agreement.require_equal("the arguments of the optimizer", facts)
    except BaseException:
        del optimizer.param_groups[first:]
        raise
