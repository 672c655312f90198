"""A param group on its way into the optimizer: all of it, or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from dist_asgd.averages.options import check_average
from dist_asgd.buckets.base import Setting
from dist_asgd.comm.consensus import Agreement
from dist_asgd.step.consistency import argument_facts
from dist_asgd.step.cuda_graphs import check_capturable
from dist_asgd.step.validation import check_last_group, drop_duplicates


def add_checked(optimizer: Optimizer, param_group: dict[str, Any], setting: Setting, agreement: Agreement) -> None:
    """torch's own checks, then ours. Nothing is added where one fails, which raises ``ValueError`` or ``TypeError``."""
    groups = optimizer.param_groups
    count = len(groups)
    try:
        Optimizer.add_param_group(optimizer, param_group)
        drop_duplicates(groups[-1])
        check_last_group(groups, agreement.ranks)
        check_average(groups[-1], count, setting.averages)
        check_capturable(groups[-1], count, setting.precision, agreement.world_size)
    except Exception:
        del groups[count:]
        raise


def add_agreed(
    optimizer: Optimizer,
    param_group: dict[str, Any],
    setting: Setting,
    agreement: Agreement,
    arguments: Mapping[str, object],
) -> None:
    """The same on every rank, once the optimizer is built; also where ranks add different groups. Collective."""
    first = len(optimizer.param_groups)
    try:
        with agreement.together("add_param_group()"):
            add_checked(optimizer, param_group, setting, agreement)
            facts = argument_facts(arguments, optimizer.param_groups, first)
        agreement.require_equal("the arguments of the optimizer", facts)
    except Exception:
        del optimizer.param_groups[first:]
        raise
