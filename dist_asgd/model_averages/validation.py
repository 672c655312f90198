"""Validates the arguments of ``ShardedAverages``."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_asgd.model_averages.parameters import named_in
from dist_asgd.step.validation import check_verify_every, some_of


def check_arguments(
    *,
    start: object,
    average_dtype: object,
    trainable_only: object,
    offload: object,
    shard_replicas: object,
    verify_every: object,
    module: object,
) -> None:
    """Validates keyword arguments.

    Raises:
        ValueError, TypeError: naming the argument, its value and the allowed values.
    """
    if isinstance(start, bool) or not isinstance(start, numbers.Real):
        raise TypeError(f"start must be a number, got {start!r}")
    if not (float(start) >= 0 and (math.isinf(start) or float(start).is_integer())):
        raise ValueError(f"start must be a whole number >= 0, or math.inf to wait for start_averaging(), got {start!r}")
    if average_dtype is not None and not (isinstance(average_dtype, torch.dtype) and average_dtype.is_floating_point):
        raise TypeError(f"average_dtype must be a floating-point torch.dtype or None, got {average_dtype!r}")
    for name, value in (("trainable_only", trainable_only), ("offload", offload), ("shard_replicas", shard_replicas)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    check_verify_every(verify_every)
    if verify_every is not None and not shard_replicas:
        raise ValueError(
            "verify_every compares what ranks must hold alike, and shard_replicas=False lets each rank hold other "
            "values: leave out one of them"
        )
    if module is not None and not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module or None, got {module!r}")


def optimizers_in(optimizer: object) -> list[Optimizer]:
    """Returns the optimizers that the argument ``optimizer`` means. Raises ``TypeError`` for something else."""
    if optimizer is None:
        return []
    found: list[Optimizer] = []
    for each in optimizer if isinstance(optimizer, Sequence) else [optimizer]:
        if not isinstance(each, Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, several of them, or None, got {type(each).__name__}. Call "
                "update() after each step of an optimizer of another class"
            )
        found.append(each)
    if len(set(map(id, found))) < len(found):
        raise ValueError("optimizer has one optimizer twice")
    return found


def check_module(named: Mapping[Tensor, str], module: nn.Module | None) -> None:
    """Raises ``ValueError`` where ``module`` has other parameters in the places of ``named``."""
    if module is None:
        return
    held = named_in(module)
    replaced = [name for param, name in named.items() if name in held and held[name] is not param]
    if replaced:
        raise ValueError(
            f"parameter {some_of(replaced)} is not the one that module= has under this name: it was replaced "
            "(fully_shard, parallelize_module, load_state_dict(assign=True)), or is of another model. Pass the "
            "module's own named_parameters(), taken when it is placed as it is trained"
        )
