"""Checks of ``capturable=True`` and of captures in CUDA graphs, and the loss scale that GradScaler hands to a step."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_asgd.asgd.schedule import Hyperparameters, Scaling, is_captured
from dist_asgd.buckets.base import Bucket
from dist_asgd.kernels.dispatch import can_capture
from dist_asgd.sharding.precision import Precision
from dist_asgd.step.validation import parameter_names


def check_capturable(group: Mapping[str, Any], number: int, precision: Precision, world_size: int) -> None:
    """Raises ``ValueError`` where ``capturable=True`` cannot hold for a parameter of param group ``number``.

    Args:
        group: the param group.
        precision: options of the optimizer, ``capturable`` among them.
        world_size: number of ranks of the optimizer.
    """
    found = group["capturable"]
    if found is not precision.capturable:
        raise ValueError(f"group {number} has capturable={found!r}: it is an option of the optimizer, for all groups")
    if not precision.capturable:
        return
    lr = Hyperparameters.of(group).device_lr
    for name, param in zip(parameter_names(group, number), group["params"], strict=True):
        if world_size > 1 and not isinstance(param, DTensor):
            raise ValueError(
                f"capturable=True with {world_size} ranks is for DTensors (FSDP2, tensor parallelism), whose step() "
                f"needs no other rank. Parameter {name!r} is none: ranks agree on its steps, which no CUDA graph holds"
            )
        if not _can_capture(param.device, param.dtype, precision):
            raise ValueError(
                "capturable=True needs parameters on a CUDA device, and dtypes that the Triton kernel updates there: "
                "float32, float64, bfloat16, float16 or complex ones, averages in fp32 or wider parameters' own. "
                f"Parameter {name!r} is {param.dtype} on {param.device}, averages are {precision.average(param.dtype)}"
            )
        if lr is not None and lr.device != param.device:
            raise ValueError(f"lr is a tensor on {lr.device}, parameter {name!r} is on {param.device}: put lr there")


@functools.cache
def _can_capture(device: torch.device, dtype: torch.dtype, precision: Precision) -> bool:
    rounding = precision.rounding(dtype, travels=False, seed=0)
    has_master = precision.needs_master(dtype, rounding.dtype)
    return can_capture(device, dtype, precision.average(dtype), has_master, rounding)


def refuse_capture(options: Sequence[Hyperparameters], started: bool, buckets: Sequence[Bucket]) -> None:
    """Raises ``RuntimeError`` where a step is being captured in a CUDA graph whose replays would be wrong.

    Args:
        options: options of each param group.
        started: whether a step was taken since the last param group was added.
        buckets: all buckets of the optimizer.
    """
    if not any(map(is_captured, {bucket.device for bucket in buckets})):
        return
    if not all(h.capturable for h in options):
        raise RuntimeError(
            "step() is being captured in a CUDA graph, which would repeat one and the same step: step, eta and mu lie "
            "in the host's memory. Build the optimizer with capturable=True"
        )
    if not started:
        raise RuntimeError(
            "the first step() is being captured in a CUDA graph: take one at least before, on a side stream, as "
            "torch.cuda.graph asks for"
        )


def scaling_of(optimizer: Any) -> Scaling | None:
    """Returns the scale that ``torch.amp.GradScaler`` has set on ``optimizer`` for this step; None without a scaler.

    The scaler sets ``found_inf`` and ``grad_scale`` on optimizers that unscale gradients themselves
    (``_step_supports_amp_scaling``), and deletes both after the step.
    """
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    if found_inf is None:
        return None
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    # In fp64 and then rounded, as in GradScaler.unscale_.
    return Scaling(None if scale is None else scale.double().reciprocal().float(), found_inf)
