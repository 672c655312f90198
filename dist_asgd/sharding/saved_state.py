"""Checks that a parameter's saved state fits the parameter; errors name the mismatch."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_asgd.sharding.layout import Piece
from dist_asgd.sharding.placement import Placement
from dist_asgd.sharding.sharded_state import StatePiece


def has_begun(state: Mapping[str, Any]) -> bool:
    """Whether an average in a parameter's saved state has started: until then, mu is 1 and ax is the parameter."""
    return any(state[key] != 1 for key in state if key == "mu" or str(key).startswith("mu_"))


def check_state(
    state: Mapping[str, Any], dtypes: Mapping[str, torch.dtype], placement: Placement, piece: Piece | None
) -> None:
    """Raises ``ValueError`` where the saved ``state`` of one parameter does not fit the parameter.

    Args:
        state: step, eta, mu, ax and further averages of the parameter, by torch's names.
        dtypes: the dtypes that the optimizer keeps tensors of the state in, by name: averages, and ``master``, which
            the state need not have.
        placement: this rank's block of the parameter.
        piece: the part of the block that this rank owns; None if it owns none.
    """
    averages = [name for name in dtypes if name != "master"]
    scalars = ["step", "eta", *(f"mu{name.removeprefix('ax')}" for name in averages)]
    needed = {*scalars, *averages} if has_begun(state) else {"step", "eta", "mu", "ax"}
    if missing := needed - state.keys():
        raise ValueError(f"has no {', '.join(sorted(missing))}: it is not that of an ASGD optimizer")
    _check_scalars(state, [name for name in scalars if name in state])
    for name, dtype in dtypes.items():
        if (value := state.get(name)) is not None or name == "ax":
            _check_tensor(name, value, dtype, placement)
        if isinstance(value, StatePiece):
            _check_piece(name, value, placement, piece)


def _check_scalars(state: Mapping[str, Any], names: Iterable[str]) -> None:
    for name in names:
        value = state[name]
        real = isinstance(value, numbers.Real)  # NumPy's scalars are registered as Real
        if not (real or (isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex())):
            raise ValueError(f"has {name} = {value!r}, which is not a number")
        number = float(value)
        if not 0 <= number <= (1 if name.startswith("mu") else math.inf) or math.isinf(number):
            raise ValueError(f"has {name} = {number:g}, which is out of range")


def _check_tensor(name: str, value: object, dtype: torch.dtype, placement: Placement) -> None:
    if not isinstance(value, Tensor) or value.shape != placement.whole:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"has {name} of shape {found}, the parameter is {placement.whole}")
    if value.layout is not torch.strided or value.is_meta:
        raise ValueError(f"has {name} of layout {value.layout} on {value.device}: it must be dense, with values")
    exact = value.is_floating_point() or value.is_complex()
    if not exact or torch.promote_types(value.dtype, dtype) != dtype:
        raise ValueError(f"has {name} of {value.dtype}, the optimizer keeps it in {dtype}: convert it first")
    if isinstance(value, DTensor) and not placement.same_block(Placement.of(value)):
        raise ValueError(
            f"has {name} as a DTensor with {value.placements} on {value.device_mesh}, of which this rank has another "
            "block than of the parameter. torch.distributed.checkpoint moves state between placements"
        )


def _check_piece(name: str, value: StatePiece, placement: Placement, piece: Piece | None) -> None:
    if not placement.same_block(value.placement):
        raise ValueError(
            f"has a piece of the block at {value.placement.offsets} of {name}, this rank has the one at "
            f"{placement.offsets}: it was saved under another placement, or by another rank. "
            "torch.distributed.checkpoint and full_state_dict() move state between ranks"
        )
    if value.placement.order != placement.order:
        raise ValueError(
            f"has {name} in the memory order of dims {value.placement.order}, the parameter has "
            f"{placement.order}. torch.distributed.checkpoint and full_state_dict() move state between them"
        )
    if piece is not None:
        stop = value.start + len(value.local)
        if (value.start, stop) != (piece.start, piece.stop):
            raise ValueError(
                f"has elements [{value.start}, {stop}) of {name}, this rank needs [{piece.start}, "
                f"{piece.stop}): it was saved by another rank, or by another number of ranks. "
                "torch.distributed.checkpoint and full_state_dict() move state between ranks"
            )
