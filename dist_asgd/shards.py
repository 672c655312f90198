"""What a rank owns of a bucket: tensors and scalars, their update, and their way in and out of state dicts.

[Note: the tensors of a shard] All are 1-D, of ``layout.shard_numel`` elements and indexed alike:
- the shard of the parameters themselves, which ``ShardParameters`` reads and writes.
- ``master``: for bf16 and fp16 parameters, the fp32 values of which they are the rounding; else None.
- ``average``: ``ax``. None until a parameter of the bucket starts averaging: before that, ``ax`` *is* the parameter.
  With ``capturable`` it is there from the beginning, since a CUDA graph can make nothing.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_asgd.averages import Average
from dist_asgd.layout import BucketLayout, Piece
from dist_asgd.pieces import Placement, StatePiece
from dist_asgd.precision import Precision
from dist_asgd.rule import (
    AnyScalars,
    DeviceScalars,
    Hyperparameters,
    Rounding,
    Scalars,
    Scaling,
    compute_dtype,
    current_scalars,
    followed,
    next_scalars,
)
from dist_asgd.runs import Run, merge_runs, select_runs
from dist_asgd.update import UpdateSlice, advance_, can_fuse

FRESH = Scalars(step=0, eta=0.0, mu=1.0)  # of a parameter that has taken no step


class ShardParameters(Protocol):
    """The parameters of a shard, wherever they lie, indexed as the shard."""

    dtype: torch.dtype
    device: torch.device

    def read(self, where: slice = slice(None)) -> Tensor:
        """1-D. It may be the parameters themselves: not to be written to."""

    def copy(self) -> Tensor:
        """All of it, in memory of its own."""

    def own(self, piece: Piece) -> Tensor:
        """A part of it, 1-D and contiguous: the parameters themselves."""

    def write(self, where: slice, values: Tensor) -> None:
        """``where`` begins and ends between parameters."""

    def wrap(self, position: int, local: Tensor) -> Tensor:
        """``local``, all that the parameter has on this rank, as a tensor that is placed as the parameter is."""


class Shard:
    """One rank's shard of one bucket.

    Args:
        parameters: of the rank's shard.
        layout: of the bucket.
        placements: of the parameters, by position in ``layout.spans``.
        rank: whose shard it is.
        rounding: of the parameters, the first in ``layout`` being number 0.
        kind: of average.
    """

    def __init__(
        self,
        parameters: ShardParameters,
        layout: BucketLayout,
        placements: Sequence[Placement],
        rank: int,
        precision: Precision,
        rounding: Rounding,
        kind: Average,
    ) -> None:
        self.parameters, self.dtype, self.rounding = parameters, parameters.dtype, rounding
        self.layout, self.placements = layout, tuple(placements)
        self.start, self.stop = layout.shard(rank)
        self.pieces: dict[int, Piece] = {piece.position: piece for piece in layout.pieces(rank)}
        self.master: Tensor | None = None
        if precision.needs_master(self.dtype, rounding.dtype):
            self.master = parameters.read().to(compute_dtype(self.dtype), copy=True)
        self._raw: Tensor | None = None  # the parameters themselves while others are swapped in
        self.average_dtype = precision.average(self.dtype)
        self._capturable, self._kind, self.average = precision.capturable, kind, None
        if self._capturable:
            self.average = self._iterate().to(self.average_dtype, copy=True)
        # Whether its parameters are updated in one pass, wherever they lie.
        self.fuses = can_fuse(parameters.device, self.dtype, self.average_dtype, self.master is not None, rounding)
        self.runs: list[Run] = []
        self._set_runs([Run(0, len(self.placements), FRESH)])

    def slice_of(self, run: Run) -> slice:
        """Where the parameters of ``run`` lie in the shard; empty where they lie elsewhere."""
        spans = self.layout.spans
        start = min(max(spans[run.first].start, self.start), self.stop) - self.start
        stop = min(max(spans[run.stop - 1].stop, self.start), self.stop) - self.start
        return slice(start, max(start, stop))

    def update(
        self,
        h: Hyperparameters,
        active: Sequence[bool] | None,
        slices: Callable[[Run], Iterable[UpdateSlice]],
        scaling: Scaling | None = None,
    ) -> None:
        """One step of the parameters that are ``active`` (None: all), by the ``slices`` of each run.

        Args:
            scaling: of the gradients; only with ``capturable``.
        """
        runs = []
        for run, is_active in select_runs(self.runs, active):
            runs.append(self._step(run, h, slices, scaling) if is_active else run)
        averaged = self._capturable or any(run.scalars.read().mu != 1 for run in [*self.runs, *runs])
        if active is None and not averaged:
            self.average = None  # every parameter has just become its own average
        self.runs = merge_runs(runs)

    def _step(
        self,
        run: Run,
        h: Hyperparameters,
        slices: Callable[[Run], Iterable[UpdateSlice]],
        scaling: Scaling | None,
    ) -> Run:
        if isinstance(run.scalars, DeviceScalars):
            scalars = run.scalars.scaled(scaling)
            self._update(scalars, h, slices(run))
            advance_(scalars, h)
            return run
        known = current_scalars(h, run.scalars)
        self._update(known, h, slices(run))
        following = next_scalars(h, known.step + 1, self._kind)
        if following.mu != 1 and self.average is None:
            # Now, not in the next step: what is written to the parameters in between is no part of the average.
            self.average = self.average_copy()
        return replace(run, scalars=following)

    def _update(self, scalars: AnyScalars, h: Hyperparameters, slices: Iterable[UpdateSlice]) -> None:
        idle = isinstance(scalars, Scalars) and scalars.mu == 0  # the average does not take this iterate
        for part in slices:
            where = slice(part.start, part.stop)
            average = None if self.average is None or idle else self.average[where]
            rounding = self.rounding.at(self.start + part.start, scalars)
            part.update_(average, None if self.master is None else self.master[where], h, scalars, rounding)

    @property
    def averages(self) -> bool:
        """Whether a parameter of the bucket has an average of its own; the same on every rank."""
        return any(run.scalars.read().mu != 1 for run in self.runs)

    def average_copy(self) -> Tensor:
        """The average of every element, in ``average_dtype``; where there is none yet, that is the parameter."""
        if self.average is not None:
            return self.average.clone()
        return self._iterate().to(self.average_dtype, copy=True)

    def keep(self) -> None:
        """Copies the parameters, for ``swap_out``."""
        self._raw = self.parameters.copy()

    def swap_in(self) -> None:
        """Overwrites the parameters that have an average of their own by it, rounded once."""
        for run in self.runs:
            if run.scalars.read().mu != 1 and self.average is not None:
                self.parameters.write(self.slice_of(run), self.average[self.slice_of(run)])

    def swap_out(self) -> None:
        """Makes the parameters exactly what they were when they were kept, if they were."""
        if self._raw is not None:
            self.parameters.write(slice(None), self._raw)
            self._raw = None

    def _iterate(self, where: slice = slice(None)) -> Tensor:
        """What training has made of the parameters; of masters, if any, a copy: looking changes nothing."""
        param = self.parameters.read(where) if self._raw is None else self._raw[where]
        return param if self.master is None else followed(self.master[where], param, self.rounding.dtype)

    # State dicts -----------------------------------------------------------------------------------------------------

    def scalars(self, h: Hyperparameters) -> list[Scalars]:
        """The scalars of every parameter of the bucket, by position."""
        expanded = [(run, _scalars(run, h)) for run in self.runs]
        return [scalars for run, scalars in expanded for _ in range(run.first, run.stop)]

    def scalars_of(self, position: int, h: Hyperparameters) -> Scalars:
        return _scalars(next(run for run in self.runs if run.first <= position < run.stop), h)

    def state_of(self, position: int) -> dict[str, Tensor]:
        """The tensors of one parameter by torch's names."""
        where = self._where(position)
        ax = self._iterate(where).to(self.average_dtype, copy=True) if self.average is None else self.average[where]
        state = {"ax": self._as_piece(ax, position)}
        if self.master is not None:
            state["master"] = self._as_piece(self._iterate(where), position)
        return state

    def tensors(self) -> dict[str, Tensor]:
        """The state of the whole shard by torch's names. Copies, but for ``ax`` once averaging has started."""
        state = {"ax": self.average_copy() if self.average is None else self.average}
        if self.master is not None:
            state["master"] = self._iterate()
        return state

    def writes_scalars(self, position: int) -> bool:
        """Whether this rank writes a parameter's scalars to checkpoints: who has its first element does."""
        placement, piece = self.placements[position], self.pieces.get(position)
        has_first = piece is not None and piece.start == 0 and not any(placement.offsets)
        return has_first or not math.prod(placement.whole)

    def piece_of(self, flat: Tensor, position: int) -> Tensor:
        """The part of ``flat`` (1-D, a tensor of the shard) that belongs to one parameter; whole with one rank."""
        return self._as_piece(flat[self._where(position)], position)

    def _where(self, position: int) -> slice:
        """Where one parameter lies in the shard; empty where it lies elsewhere."""
        piece = self.pieces.get(position)
        return slice(0, 0) if piece is None else slice(piece.shard_start, piece.shard_stop)

    def _as_piece(self, local: Tensor, position: int) -> Tensor:
        piece = self.pieces.get(position)
        if self.layout.world_size == 1:
            return self.parameters.wrap(position, self.placements[position].view(local))
        return StatePiece(local, 0 if piece is None else piece.start, self.placements[position])

    def check_state(self, position: int, state: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` where ``state`` is not that of the parameter, saying what is wrong."""
        placement, piece = self.placements[position], self.pieces.get(position)
        missing = {"step", "eta", "mu", "ax"} - state.keys()
        if missing:
            raise ValueError(f"has no {', '.join(sorted(missing))}: it is not that of an ASGD optimizer")
        _check_scalars(state)
        for name, dtype in (("ax", self.average_dtype), ("master", compute_dtype(self.dtype))):
            value = state.get(name)
            if value is None and name == "master":
                continue
            if not isinstance(value, Tensor) or value.shape != placement.whole:
                found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"has {name} of shape {found}, the parameter is {placement.whole}")
            if value.layout is not torch.strided or value.is_meta:
                raise ValueError(
                    f"has {name} of layout {value.layout} on {value.device}: it must be dense, with values"
                )
            exact = value.is_floating_point() or value.is_complex()
            if not exact or torch.promote_types(value.dtype, dtype) != dtype:
                raise ValueError(f"has {name} of {value.dtype}, the optimizer keeps it in {dtype}: convert it first")
            if isinstance(value, DTensor) and not placement.same_block(Placement.of(value)):
                raise ValueError(
                    f"has {name} as a DTensor with {value.placements} on {value.device_mesh}, of which this rank has "
                    "another block than of the parameter. torch.distributed.checkpoint moves state between placements"
                )
            if isinstance(value, StatePiece) and not placement.same_block(value.placement):
                raise ValueError(
                    f"has a piece of the block at {value.placement.offsets} of {name}, this rank has the one at "
                    f"{placement.offsets}: it was saved under another placement, or by another rank. "
                    "torch.distributed.checkpoint and full_state_dict() move state between ranks"
                )
            if isinstance(value, StatePiece) and value.placement.order != placement.order:
                raise ValueError(
                    f"has {name} in the memory order of dims {value.placement.order}, the parameter has "
                    f"{placement.order}. torch.distributed.checkpoint and full_state_dict() move state between them"
                )
            if isinstance(value, StatePiece) and piece is not None:
                stop = value.start + len(value.local)
                if (value.start, stop) != (piece.start, piece.stop):
                    raise ValueError(
                        f"has elements [{value.start}, {stop}) of {name}, this rank needs [{piece.start}, "
                        f"{piece.stop}): it was saved by another rank, or by another number of ranks. "
                        "torch.distributed.checkpoint and full_state_dict() move state between ranks"
                    )

    def load_state(self, states: Mapping[int, Mapping[str, Any]]) -> None:
        """Takes up checked states by position; the parameters that have none start afresh."""
        scalars = [_scalars_of(states[p]) if p in states else FRESH for p in range(len(self.placements))]
        self._set_runs(merge_runs([Run(p, p + 1, value) for p, value in enumerate(scalars)]))
        average = self.average_copy()
        for position, piece in self.pieces.items():
            state = states.get(position, {})
            where = slice(piece.shard_start, piece.shard_stop)
            if "ax" in state:
                average[where].copy_(self._own(state["ax"], position))
            if self.master is not None:
                master = state.get("master")
                self.master[where].copy_(self.parameters.read(where) if master is None else self._own(master, position))
        if self._capturable and self.average is not None:
            self.average.copy_(average if states else self._iterate())  # where graphs have it
            return
        # One from before averaging costs no memory, unless it says something that the parameters do not.
        says_more = self.averages or not torch.equal(average, self._iterate().to(average.dtype))
        self.average = average if states and says_more else None

    def _set_runs(self, runs: Sequence[Run]) -> None:
        if not self._capturable:
            self.runs = list(runs)
        elif [(run.first, run.stop) for run in runs] == [(run.first, run.stop) for run in self.runs]:
            for old, new in zip(self.runs, runs, strict=True):
                if isinstance(old.scalars, DeviceScalars):
                    old.scalars.set_(new.scalars.read())  # where graphs have them
        else:
            device = self.parameters.device
            self.runs = [replace(run, scalars=DeviceScalars.of(run.scalars.read(), device)) for run in runs]

    def _own(self, value: Tensor, position: int) -> Tensor:
        piece = self.pieces[position]
        if isinstance(value, StatePiece):
            return value.local
        placement = self.placements[position]
        return placement.flatten(placement.block_of(value))[piece.start : piece.stop]


def _scalars(run: Run, h: Hyperparameters) -> Scalars:
    return current_scalars(h, run.scalars.read())


def _check_scalars(state: Mapping[str, Any]) -> None:
    for name in ("step", "eta", "mu"):
        value = state[name]
        real = isinstance(value, numbers.Real)  # NumPy's too
        if not (real or (isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex())):
            raise ValueError(f"has {name} = {value!r}, which is not a number")
        number = float(value)
        if not 0 <= number <= (1 if name == "mu" else math.inf) or math.isinf(number):
            raise ValueError(f"has {name} = {number:g}, which is out of range")


def _scalars_of(state: Mapping[str, Any]) -> Scalars:
    return Scalars(step=int(state["step"]), eta=float(state["eta"]), mu=float(state["mu"]))
