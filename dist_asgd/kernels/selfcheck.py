"""Checks, before a fast form of a pass is used, that it gives the bits of PyTorch's operators on this machine."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dist_asgd.asgd.rounding import Rounding, compute_dtype
from dist_asgd.asgd.rule import average_step_, low_precision_step_
from dist_asgd.asgd.schedule import DeviceScalars, Hyperparameters, Scalars
from dist_asgd.kernels.tensor_list import Gradients, SliceStep, TensorList, UpdateKind

# Each combination of options is compared on three parts, so that tables are used. Each part has vectors and a rest; the
# second one is not aligned for vectors.
PART = 2 * 2048 + 211  # elements
STARTS = (0, 4352 + 1, 2 * 4352)
CHECKED = 3 * 4352  # elements of the tensors in which the parts lie
MUS = ((), (1.0,), (0.3,), (0.3, 1.0, 0.7))  # of each average; a device that holds the scalars has one average
FP32 = torch.float32


def matches_operators(
    update: Callable[..., None], device: torch.device, kind: UpdateKind, on_device: bool = False
) -> bool:
    """Returns whether ``update`` gives the bits of ``low_precision_step_`` under all combinations of options.

    Args:
        update: a ``FusedUpdate`` (kernels/dispatch.py) of this ``kind``.
        device: where the test tensors lie.
        on_device: whether ``update`` is given ``DeviceScalars`` instead of ``Scalars``.
    """
    rounding = Rounding(kind.rounded, 1234 if kind.stochastic else None, 5)
    generator, dtype = torch.Generator().manual_seed(0), compute_dtype(kind.param)
    combinations = itertools.product((False, True), (0.0, 0.1), MUS[1:3] if on_device else MUS)
    for maximize, weight_decay, mus in combinations:
        h = Hyperparameters(lr=0.1, lambd=0.1, alpha=0.75, t0=0.0, weight_decay=weight_decay, maximize=maximize)
        eta, *rounded = torch.tensor([0.07, *mus], dtype=FP32, device="cpu").tolist()  # a device keeps scalars in fp32
        scalars = Scalars(3, eta, tuple(rounded))
        values = _random(3 + len(mus), generator).to(device, dtype)
        first, second, other, *averages = values
        p, g = first.to(kind.param), second.to(kind.grad)
        p = torch.where(second > 0, p, p.to(rounding.dtype).to(kind.param))  # some are already rounded
        # Half of the masters belong to their parameters; the other half are out of date, and must be replaced.
        master = torch.where(other > 0, p.to(dtype), other)
        own, expected = ([tensor.clone() for tensor in (p, master, *averages)] for _ in range(2))
        given = DeviceScalars.of(scalars, device) if on_device else scalars
        p, master, *averages = own
        state = (averages, master if kind.has_master else None)
        update(TensorList.of(_parts(p), STARTS), Gradients.of(_parts(g)), SliceStep(*state, h, given, rounding))
        numbered = rounding.at(rounding.first, scalars) if on_device else rounding
        for start, *part in zip(STARTS, *map(_parts, (g, *expected)), strict=True):
            grad, p, master, *averages = part
            state = (averages, master if kind.has_master else None)
            low_precision_step_(p, grad, *state, h, scalars, replace(numbered, first=numbered.first + start))
        if not all(map(torch.equal, own, expected)):
            return False
    return True


def averages_match_operators(
    move: Callable[..., None], device: torch.device, param: torch.dtype, average: torch.dtype
) -> bool:
    """Returns whether ``move`` gives the bits of ``average_step_``.

    Args:
        move: as ``move_averages_`` (kernels/averaging.py), for these dtypes.
        device: where the test tensors lie.
        param, average: the dtypes of parameters and averages.
    """
    generator = torch.Generator().manual_seed(0)
    for mus in MUS[1:]:
        values = _random(1 + len(mus), generator).to(device)
        p, own = values[0].to(param), list(values[1:].to(average, copy=True))
        expected = [ax.clone() for ax in own]
        move(TensorList.of(_parts(p), STARTS), own, mus)
        for ax, mu in zip(expected, mus, strict=True):
            for ax_part, p_part in zip(_parts(ax), _parts(p), strict=True):
                average_step_(ax_part, p_part, mu)
        if not all(map(torch.equal, own, expected)):
            return False
    return True


def packing_matches_operators(
    pack: Callable[..., None], device: torch.device, grad: torch.dtype, wire: torch.dtype
) -> bool:
    """Returns whether ``pack``, a ``FusedPacking`` (kernels/packing.py), rounds as ``Tensor.to`` does.

    Args:
        device: where the test tensors lie.
        grad, wire: the dtypes of gradients and of the buffer.
    """
    grads = _random(1, torch.Generator().manual_seed(0))[0].to(device, grad)
    own, expected = (torch.zeros(CHECKED, dtype=wire, device=device) for _ in range(2))
    pack(TensorList.of(_parts(grads), STARTS), Gradients.of(_parts(grads)), own)
    for out, part in zip(_parts(expected), _parts(grads), strict=True):
        out.copy_(part)
    return torch.equal(own, expected)


def _parts(tensor: Tensor) -> list[Tensor]:
    return [tensor[start : start + PART] for start in STARTS]


def _random(rows: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, CHECKED, dtype=torch.float64, generator=generator, device="cpu")
