"""What a rank owns of a bucket: tensors and scalars, their update, and their way in and out of state dicts.

[Note: the tensors of a shard] All are 1-D, of ``layout.shard_numel`` elements and indexed alike:
- the shard of the parameters themselves, which ``ShardParameters`` reads and writes.
- ``master``: for bf16 and fp16 parameters, the fp32 values of which they are the rounding; else None.
- ``averages``: ``ax``, and ``ax_ema`` and the like of others beside it, by suffix. None until a parameter of the bucket
  starts that average: before that, it *is* the parameter. With ``capturable`` it is there from the beginning, since a
  CUDA graph can make nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dist_asgd.asgd.rounding import Rounding, compute_dtype, current_master
from dist_asgd.asgd.rule import average_step_
from dist_asgd.asgd.schedule import (
    AnyScalars,
    DeviceScalars,
    Hyperparameters,
    Scalars,
    Scaling,
    current_scalars,
    next_scalars,
)
from dist_asgd.averages.kinds import Average
from dist_asgd.kernels.dispatch import PASS_BYTES, UpdateSlice, advance_, can_fuse
from dist_asgd.kernels.tensor_list import as_real
from dist_asgd.sharding.layout import BucketLayout, Piece
from dist_asgd.sharding.placement import Placement
from dist_asgd.sharding.precision import Precision
from dist_asgd.sharding.saved_state import check_state
from dist_asgd.sharding.scalar_runs import Run, merge_runs, select_runs
from dist_asgd.sharding.shard_views import FlatParameters, ShardParameters
from dist_asgd.sharding.sharded_state import StatePiece


class Shard:
    """One rank's shard of one bucket.

    Args:
        parameters: of the rank's shard.
        layout: of the bucket.
        placements: of the parameters, by position in ``layout.spans``.
        rank: whose shard it is.
        rounding: of the parameters, the first in ``layout`` being number 0.
        kinds: of averages, by suffix; the first, whose suffix is empty, is updated in one pass with the parameters.
    """

    def __init__(
        self,
        parameters: ShardParameters,
        layout: BucketLayout,
        placements: Sequence[Placement],
        rank: int,
        precision: Precision,
        rounding: Rounding,
        kinds: Mapping[str, Average],
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
        self.averages: dict[str, Tensor | None] = dict.fromkeys(kinds)
        self._capturable, self._kinds = precision.capturable, tuple(kinds.values())
        if self._capturable:
            self.averages = {suffix: self.average_copy(suffix) for suffix in kinds}
        # Whether its parameters are updated in one pass, wherever they lie.
        self.fuses = can_fuse(parameters.device, self.dtype, self.average_dtype, self.master is not None, rounding)
        self.runs: list[Run] = []
        self._fresh = Scalars(0, 0.0, 1.0, (1.0,) * (len(kinds) - 1))  # of a parameter that has taken no step
        self._set_runs([Run(0, len(self.placements), self._fresh)])

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
        for number, suffix in enumerate(() if self._capturable or active is not None else self.averages):
            if not _begun([*self.runs, *runs], number):
                self.averages[suffix] = None  # every parameter has just become its own average
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
        self._update_further(run, known)
        following = next_scalars(h, known.step + 1, self._kinds)
        for suffix, mu in zip(self.averages, following.mus, strict=True):
            if mu != 1 and self.averages[suffix] is None:
                # Now, not in the next step: what is written to the parameters in between is no part of the average.
                self.averages[suffix] = self.average_copy(suffix)
        return replace(run, scalars=following)

    def _update(self, scalars: AnyScalars, h: Hyperparameters, slices: Iterable[UpdateSlice]) -> None:
        idle = isinstance(scalars, Scalars) and scalars.mu == 0  # the average does not take this iterate
        ax = None if idle else self.averages[""]
        for part in slices:
            where = slice(part.start, part.stop)
            average = None if ax is None else ax[where]
            rounding = self.rounding.at(self.start + part.start, scalars)
            part.update_(average, None if self.master is None else self.master[where], h, scalars, rounding)

    def _update_further(self, run: Run, scalars: Scalars) -> None:
        """After the step of ``run``: the averages beside the first take what it has made of the parameters."""
        pairs = zip(list(self.averages.values())[1:], scalars.further, strict=True)
        moving = [(as_real(average), mu) for average, mu in pairs if average is not None and mu != 0]
        if not moving:
            return
        where, factor = self.slice_of(run), 2 if self.dtype.is_complex else 1
        iterates: ShardParameters = self.parameters if self.master is None else FlatParameters(self.master)
        most = PASS_BYTES["cpu" if iterates.device.type == "cpu" else "others"]
        itemsize = torch.promote_types(self.average_dtype, iterates.dtype).itemsize
        for start, iterate in iterates.blocks(where, most // itemsize):
            real = as_real(iterate)
            for average, mu in moving:
                average_step_(average[factor * start : factor * start + len(real)], real, mu)

    def has_average(self, suffix: str) -> bool:
        """Whether a parameter of the bucket has an average of its own; the same on every rank."""
        return _begun(self.runs, list(self.averages).index(suffix))

    def average_copy(self, suffix: str) -> Tensor:
        """The average of every element, in ``average_dtype``; where there is none yet, that is the parameter."""
        average = self.averages[suffix]
        return self._iterate().to(self.average_dtype, copy=True) if average is None else average.clone()

    def forget_averages(self) -> None:
        """As before they began, also of parameters that take no step any more."""
        read = [run.scalars.read() for run in self.runs]
        fresh = [replace(self._fresh, step=scalars.step, eta=scalars.eta) for scalars in read]
        self._set_runs([replace(run, scalars=scalars) for run, scalars in zip(self.runs, fresh, strict=True)])
        for suffix, average in self.averages.items():
            if self._capturable and average is not None:
                average.copy_(self._iterate())  # where graphs have it
            else:
                self.averages[suffix] = None

    def keep(self) -> None:
        """Copies the parameters, for ``swap_out``."""
        self._raw = self.parameters.copy()

    def swap_in(self, suffix: str) -> None:
        """Overwrites the parameters that have an average of their own by it, rounded once."""
        average, number = self.averages[suffix], list(self.averages).index(suffix)
        for run in self.runs:
            if run.scalars.read().mus[number] != 1 and average is not None:
                self.parameters.write(self.slice_of(run), average[self.slice_of(run)])

    def swap_out(self) -> None:
        """Makes the parameters exactly what they were when they were kept, if they were."""
        if self._raw is not None:
            self.parameters.write(slice(None), self._raw)
            self._raw = None

    def _iterate(self, where: slice = slice(None)) -> Tensor:
        """What training has made of the parameters; of masters, if any, a copy: looking changes nothing."""
        param = self.parameters.read(where) if self._raw is None else self._raw[where]
        return param if self.master is None else current_master(self.master[where], param, self.rounding.dtype)

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
        state = {}
        for suffix, average in self.averages.items():
            ax = self._iterate(where).to(self.average_dtype, copy=True) if average is None else average[where]
            state[f"ax{suffix}"] = self._as_piece(ax, position)
        if self.master is not None:
            state["master"] = self._as_piece(self._iterate(where), position)
        return state

    def tensors(self) -> dict[str, Tensor]:
        """The state of the whole shard by torch's names. Copies, but for averages that have started."""
        state = {
            f"ax{suffix}": self.average_copy(suffix) if average is None else average
            for suffix, average in self.averages.items()
        }
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
        dtypes = {f"ax{suffix}": self.average_dtype for suffix in self.averages}
        dtypes |= {"master": compute_dtype(self.dtype)}
        check_state(state, dtypes, self.placements[position], self.pieces.get(position))

    def load_state(self, states: Mapping[int, Mapping[str, Any]]) -> None:
        """Takes up checked states by position; the parameters that have none start afresh."""
        scalars = [self._scalars_in(states[p]) if p in states else self._fresh for p in range(len(self.placements))]
        self._set_runs(merge_runs([Run(p, p + 1, value) for p, value in enumerate(scalars)]))
        averages = {suffix: self.average_copy(suffix) for suffix in self.averages}
        for position, piece in self.pieces.items():
            state = states.get(position, {})
            where = slice(piece.shard_start, piece.shard_stop)
            for suffix, average in averages.items():
                # One that the state has not, has not begun: it is the parameter, as the first.
                if (saved := state.get(f"ax{suffix}", state.get("ax"))) is not None:
                    average[where].copy_(self._own(saved, position))
            if self.master is not None:
                master = state.get("master")
                self.master[where].copy_(self.parameters.read(where) if master is None else self._own(master, position))
        for suffix, average in averages.items():
            kept = self.averages[suffix]
            if self._capturable and kept is not None:
                kept.copy_(average if states else self._iterate())  # where graphs have it
                continue
            # One from before averaging costs no memory, unless it says something that the parameters do not.
            says_more = self.has_average(suffix) or not torch.equal(average, self._iterate().to(average.dtype))
            self.averages[suffix] = average if states and says_more else None

    def _scalars_in(self, state: Mapping[str, Any]) -> Scalars:
        mu, *further = (float(state.get(f"mu{suffix}", 1)) for suffix in self.averages)
        return Scalars(int(state["step"]), float(state["eta"]), mu, tuple(further))

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


def _begun(runs: Sequence[Run], number: int) -> bool:
    """Whether a parameter of ``runs`` has an average of its own, of those with that number."""
    return any(run.scalars.read().mus[number] != 1 for run in runs)
