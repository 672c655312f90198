"""The shard of a bucket that one rank owns: its tensors and scalars, their update, and their state dicts.

[Note: the tensors of a shard] All are 1-D, of ``layout.shard_numel`` elements and indexed alike:

- parameters: read and written through ``ShardParameters``, in the dtype of the parameters.
- ``master``: for parameters that a step rounds (bf16, fp16), the unrounded values in the compute dtype (fp32). None for
  other parameters, and without ``master_weights``.
- ``averages``: ``ax`` and further averages such as ``ax_ema``, by suffix (``""``, ``"_ema"``), in the average dtype. An
  average is None until a parameter of the bucket starts it; until then its value is the parameter. With ``capturable``
  every average exists from the beginning, since a CUDA graph cannot allocate it later.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dist_asgd._torch_private import has_other_users
from dist_asgd.asgd.rounding import Rounding, compute_dtype, current_master
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
from dist_asgd.kernels.averaging import move_averages_
from dist_asgd.kernels.dispatch import Forms, UpdateSlice, advance_
from dist_asgd.kernels.offloading import copy_on, move_host_averages_
from dist_asgd.kernels.tensor_list import SliceStep, TensorList, as_real
from dist_asgd.sharding.layout import BucketLayout, Piece
from dist_asgd.sharding.placement import Placement
from dist_asgd.sharding.precision import Precision
from dist_asgd.sharding.saved_state import check_state
from dist_asgd.sharding.scalar_runs import Run, merge_runs, select_runs
from dist_asgd.sharding.shard_views import ShardParameters
from dist_asgd.sharding.sharded_state import StatePiece

DIFFERENCE_BLOCK = 2**20  # elements whose difference is computed at once, in fp64

Following = Callable[[int], Scalars]  # the scalars after a number of steps


class Shard:
    """One rank's shard of one bucket.

    Args:
        parameters: access to the parameters of the shard.
        layout: the layout of the bucket.
        placements: this rank's blocks of the parameters, by position in ``layout.spans``.
        rank: the rank that owns the shard, in the numbering of ``layout``.
        precision: the dtypes of averages and masters.
        rounding: how a step rounds parameters; element 0 of the bucket is its element 0.
        kinds: the kinds of average by suffix. The first has the empty suffix.
        trained: whether a parameter is to be trained. Otherwise masters are made by the first step, if there is one.
        offload: whether averages are kept in the memory of the host.
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
        trained: bool = True,
        offload: bool = False,
    ) -> None:
        self.parameters, self.dtype, self.rounding = parameters, parameters.dtype, rounding
        self.layout, self.placements = layout, tuple(placements)
        self.start, self.stop = layout.shard(rank)
        self._numel = layout.shard_numel
        self.pieces: dict[int, Piece] = {piece.position: piece for piece in layout.pieces(rank)}
        self.master: Tensor | None = None  # 1-D, compute dtype (fp32 for bf16 and fp16)
        self._needs_master = precision.needs_master(self.dtype, rounding.dtype)
        if trained or precision.capturable:
            self._make_master()
        self._raw: Tensor | None = None  # 1-D, copy of the parameters while averages are swapped in
        self.average_dtype = precision.average(self.dtype)
        self.forms = Forms(parameters.device, self.dtype, self.average_dtype, self._needs_master, rounding)
        self._average_device = torch.device("cpu") if offload else parameters.device
        self.averages: dict[str, Tensor | None] = dict.fromkeys(kinds)  # 1-D, average_dtype
        self._lent: dict[str, tuple[Tensor, Tensor]] = {}  # averages and master, with what state dicts have of them
        self._borrowers: list[weakref.ref[StatePiece]] = []  # pieces that share memory of parameters or masters
        self._made: set[str] = set()  # suffixes of averages that exist only because the state was read
        self._capturable, self._kinds = precision.capturable, tuple(kinds.values())
        if self._capturable:
            self.averages = {suffix: self.average_copy(suffix) for suffix in kinds}
        self.runs: list[Run] = []
        self._fresh = Scalars(0, 0.0, (1.0,) * len(kinds))  # the scalars before the first step
        self._set_runs([Run(0, len(self.placements), self._fresh)])

    def slice_of(self, run: Run) -> slice:
        """Returns where the parameters of ``run`` lie in the shard; an empty slice if they lie in other shards."""
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
        """Takes one step with parameters, masters, averages and scalars.

        Args:
            h: the hyperparameters of the step.
            active: one flag for each parameter of the bucket, whether it takes the step; None if all do.
            slices: returns the parts of the shard that a run covers, with their gradients.
            scaling: the scale of the gradients, from GradScaler; only with ``capturable``.
        """
        self._make_master()
        self._copy_lent()
        self._drop_unwritten()
        runs = [
            self._step(run, h, slices, scaling) if is_active else run
            for run, is_active in select_runs(self.runs, active)
        ]
        self._take_runs(runs, drop_ended=active is None)

    def take_iterate(
        self,
        following: Following,
        active: Sequence[bool] | None,
        parts: Callable[[Run], Iterable[tuple[slice, TensorList]]],
    ) -> None:
        """Counts one step in which something else has updated the parameters, and moves the averages to them.

        Args:
            following: returns the scalars after a number of steps of this method.
            active: one flag for each parameter of the bucket, whether it takes the step; None if all do.
            parts: returns the parameters of a run where they lie, with their places in the shard.
        """
        self._copy_lent()
        self._drop_unwritten()
        runs = [
            self._average(run, following, parts(run)) if is_active else run
            for run, is_active in select_runs(self.runs, active)
        ]
        self._take_runs(runs, drop_ended=active is None)

    def _average(self, run: Run, following: Following, parts: Iterable[tuple[slice, TensorList]]) -> Run:
        known = run.scalars.read()
        pairs = zip(self.averages.values(), known.mus, strict=True)
        moving = [(average, mu) for average, mu in pairs if average is not None and mu != 0]
        move = move_averages_ if self._average_device == self.parameters.device else move_host_averages_
        for where, tensors in parts if moving else ():
            move(tensors, [as_real(average[where]) for average, _ in moving], [mu for _, mu in moving])
        return self._advance(run, following(known.step + 1))

    def promote_average(self, source: str, target: str, following: Following) -> None:
        """Lets the average ``source`` take the place of ``target`` and begin anew.

        Args:
            source, target: suffixes of averages.
            following: returns the scalars after a number of steps of ``take_iterate``.
        """
        self._copy_lent()
        self.averages[target], self.averages[source] = self.averages[source], None
        self._set_runs([replace(run, scalars=following(run.scalars.read().step)) for run in self.runs])

    def _take_runs(self, runs: list[Run], *, drop_ended: bool) -> None:
        """Sets the runs after a step. ``drop_ended`` says whether averages that no run has are dropped."""
        looked_at = self.averages.items() if drop_ended and not self._capturable else ()
        for number, (suffix, average) in enumerate(looked_at):
            if average is not None and not (_has_begun(runs, number) or _has_begun(self.runs, number)):
                self.averages[suffix] = None  # every parameter is its own average again
        self.runs = merge_runs(runs) if len(runs) > 1 else runs

    def _make_master(self) -> None:
        """Makes the masters if the parameters need them and have none yet."""
        if self._needs_master and self.master is None:
            self.master = self.parameters.read().to(compute_dtype(self.dtype), copy=True)

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
        # Before the update, because with an lr on the device it waits for what the device has to do.
        following = next_scalars(h, known.step + 1, self._kinds)
        self._update(known, h, slices(run))
        return self._advance(run, following)

    def _advance(self, run: Run, following: Scalars) -> Run:
        """Returns ``run`` with the scalars ``following`` a step, and makes the averages that begin after it."""
        for suffix, mu in zip(self.averages, following.mus, strict=True):
            if mu != 1 and self.averages[suffix] is None:
                # Copied now, not in the next step, so that values written to parameters in between are no part of it.
                self.averages[suffix] = self.average_copy(suffix)
        return Run(run.first, run.stop, following)

    def _update(self, scalars: AnyScalars, h: Hyperparameters, slices: Iterable[UpdateSlice]) -> None:
        averages = list(self.averages.values())
        if isinstance(scalars, Scalars):  # an average whose mu is 0 keeps its value in this step
            pairs = [(ax, mu) for ax, mu in zip(averages, scalars.mus, strict=True) if ax is not None and mu != 0]
            if len(pairs) < len(averages):
                averages, mus = [ax for ax, _ in pairs], tuple(mu for _, mu in pairs)
                scalars = Scalars(scalars.step, scalars.eta, mus)
        moving = [as_real(ax) for ax in averages if ax is not None]
        master, per_element = None if self.master is None else as_real(self.master), 2 if self.dtype.is_complex else 1
        for part in slices:
            step = SliceStep(moving, master, h, scalars, self.rounding.at(self.start + part.start, scalars))
            if part.stop - part.start < self._numel:  # a view of all would take a microsecond
                where = slice(per_element * part.start, per_element * part.stop)
                own = None if master is None else master[where]
                step = step._replace(averages=[ax[where] for ax in moving], master=own)
            part.update_(step, self.forms)

    def has_average(self, suffix: str) -> bool:
        """Whether a parameter of the bucket has started this average. Every rank gets the same answer."""
        return _has_begun(self.runs, list(self.averages).index(suffix))

    def average_copy(self, suffix: str) -> Tensor:
        """Returns a copy of an average (1-D, ``average_dtype``); an average that has not started is the parameters."""
        average = self.averages[suffix]
        if average is None:
            return copy_on(self._average_device, self._iterate(), self.average_dtype)
        return average.clone()

    def forget_averages(self) -> None:
        """Resets all averages to their state before they started, also for parameters that are frozen now."""
        read = [run.scalars.read() for run in self.runs]
        fresh = [replace(self._fresh, step=scalars.step, eta=scalars.eta) for scalars in read]
        self._set_runs([replace(run, scalars=scalars) for run, scalars in zip(self.runs, fresh, strict=True)])
        for suffix, average in self.averages.items():
            if self._capturable and average is not None:
                average.copy_(self._iterate())  # CUDA graphs hold the address
            else:
                self.averages[suffix] = None

    def save_parameters(self) -> None:
        """Copies the parameters, which ``swap_out`` then restores."""
        self._copy_lent()
        self._raw = self.parameters.copy()

    def swap_in(self, suffix: str) -> None:
        """Overwrites the parameters that have started an average with the average, rounded once."""
        average, number = self.averages[suffix], list(self.averages).index(suffix)
        for run in self.runs:
            if run.scalars.read().mus[number] != 1 and average is not None:
                self.parameters.write(self.slice_of(run), average[self.slice_of(run)])

    def swap_out(self) -> None:
        """Restores the values that ``save_parameters`` has copied, bit for bit; does nothing without a copy."""
        if self._raw is not None:
            self.parameters.write(slice(None), self._raw)
            self._raw = None

    def distance_parts(self, suffix: str) -> list[Tensor]:
        """Returns the 2-norms of parts of the difference between the parameters as trained and an average.

        0-dim, fp64, on the device of the averages. Parameters whose average has not started have no difference. Sends
        nothing.
        """
        average, number = self.averages[suffix], list(self.averages).index(suffix)
        if average is None:
            return []
        begun = [run for run in self.runs if run.scalars.read().mus[number] != 1]
        places = [self._where(position) for run in begun for position in range(run.first, run.stop)]
        return [part for where in places for part in _difference_norms(self._iterate(where), average[where])]

    def _iterate(self, where: slice = slice(None)) -> Tensor:
        """Returns the parameters as trained, unrounded where there are masters, also while averages are swapped in.

        1-D. Without masters these may be the parameters themselves; with masters, a copy.
        """
        param = self._trained(where)
        return param if self.master is None else current_master(self.master[where], param, self.rounding.dtype)

    def _trained(self, where: slice) -> Tensor:
        """Returns the parameters as trained (1-D, possibly themselves), also while averages are swapped in."""
        return self.parameters.read(where) if self._raw is None else self._raw[where]

    def _iterate_of(self, position: int) -> Tensor:
        """Returns the piece of one parameter as trained: its own memory, or its master's.

        1-D. It is a copy while averages are swapped in, and where somebody has written the parameter since the last
        step: the master stays as it is, since the parameter may be about to be loaded.
        """
        where, piece = self._where(position), self.pieces.get(position)
        if piece is None or self._raw is not None:
            return self._iterate(where)
        param = self.parameters.view_of(piece)
        if self.master is None:
            return param
        current = current_master(self.master[where], param, self.rounding.dtype)
        return self.master[where] if torch.equal(current, self.master[where]) else current

    # State dicts -----------------------------------------------------------------------------------------------------

    def scalars(self, h: Hyperparameters) -> list[Scalars]:
        """Returns the scalars of every parameter of the bucket, by position."""
        expanded = [(run, _scalars(run, h)) for run in self.runs]
        return [scalars for run, scalars in expanded for _ in range(run.first, run.stop)]

    def scalars_of(self, position: int, h: Hyperparameters) -> Scalars:
        """Returns the scalars of the parameter at ``position``."""
        return _scalars(self._run_of(position), h)

    def step_of(self, position: int) -> int:
        """Returns the number of steps that the parameter at ``position`` has taken."""
        return self._run_of(position).scalars.read().step

    def has_stepped(self) -> bool:
        """Whether a parameter of the bucket has taken a step."""
        return any(run.scalars.read().step for run in self.runs)

    def _run_of(self, position: int) -> Run:
        return next(run for run in self.runs if run.first <= position < run.stop)

    @property
    def state_names(self) -> list[str]:
        """The names of the state tensors of every parameter, as in torch."""
        return [f"ax{suffix}" for suffix in self.averages] + ["master"] * (self.master is not None)

    def live(self, name: str, position: int) -> Tensor:
        """Returns a state tensor of one parameter: a piece, or whole with one rank. Shares memory with the shard."""
        return self._as_piece(self._live(name, self._where(position)), position)

    def set_tensor(self, name: str, position: int, value: Tensor) -> None:
        """Copies ``value``, which ``check_state`` has passed, to a state tensor of one parameter.

        Raises:
            ValueError: where the parameter is not the rounding of a ``value`` that is to be its master.
        """
        if position not in self.pieces:
            return
        where, values = self._where(position), self._cut(value, position)
        if name == "master":
            param = self._trained(where)
            if ((values.to(param.device, self.rounding.dtype) != param) & (param == param)).any():
                raise ValueError("a master follows its parameter, which is not the rounding of it: write the parameter")
        self._copy_lent()
        self._live(name, where).copy_(values)

    def set_scalars(self, position: int, values: Mapping[str, Any]) -> None:
        """Sets the scalars of one parameter, by torch's names, all of which ``check_state`` has passed."""
        self._set_scalars(position, self._scalars_in(values))

    def load_parameter(self, position: int, state: Mapping[str, Any]) -> None:
        """Loads the state of one parameter, which ``check_state`` has passed; an empty one starts it anew."""
        self._copy_lent()
        if state:
            self._make_master()
        where, averages = self._where(position), {suffix: self._writable(suffix) for suffix in self.averages}
        self._set_scalars(position, self._scalars_in(state) if state else self._fresh)
        if position in self.pieces:
            self._load_tensors(position, state, averages)
            for average in averages.values() if not state else ():
                average[where].copy_(self._iterate(where))

    def _live(self, name: str, where: slice) -> Tensor:
        if name == "master" and self.master is not None:
            master = self.master[where]
            return current_master(master, self._trained(where), self.rounding.dtype, out=master)
        return self._writable(name.removeprefix("ax"))[where]

    def _writable(self, suffix: str) -> Tensor:
        """Returns an average (1-D); one that has not started is made, and dropped again by the next step."""
        average = self.averages[suffix]
        if average is None:
            average = self.averages[suffix] = self.average_copy(suffix)
            self._made.add(suffix)
        return average

    def _drop_unwritten(self) -> None:
        """Drops averages that were made for somebody to look at, and are the parameters still."""
        if not self._made:
            return
        for number, suffix in enumerate(self.averages):
            average = self.averages[suffix]
            if suffix in self._made and average is not None and not _has_begun(self.runs, number):
                same = torch.equal(average, self._iterate().to(average))
                self.averages[suffix] = None if same else average
        self._made.clear()

    def _set_scalars(self, position: int, scalars: Scalars) -> None:
        runs = []
        for run in (replace(run, scalars=run.scalars.read()) for run in self.runs):
            if run.first <= position < run.stop:
                runs.append(replace(run, stop=position))
                runs.append(Run(position, position + 1, scalars))
                run = replace(run, first=position + 1)
            runs.append(run)
        self._set_runs(merge_runs(run for run in runs if run.first < run.stop))
        for suffix, mu in zip(self.averages, scalars.mus, strict=True):
            if mu != 1:
                self._writable(suffix)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the state tensors of the shard (1-D) by torch's names, which may share memory: for reading only."""
        iterate = self._iterate()
        averages = self.averages.items()
        state = {f"ax{suffix}": iterate.to(self.average_dtype) if ax is None else ax for suffix, ax in averages}
        return state if self.master is None else state | {"master": iterate}

    def state_of(self, position: int) -> dict[str, Tensor]:
        """Returns the state tensors of one parameter by torch's names, as they are now: pieces, or whole with one rank.

        They share memory with the shard until it changes; what is still in use then is copied. Whole averages that have
        not started are copies.
        """
        where, iterate = self._where(position), self._iterate_of(position)
        state = {
            f"ax{suffix}": self._borrow(iterate.to(self.average_dtype), position)
            if average is None
            else self._as_piece(self._lend(f"ax{suffix}", average)[where], position)
            for suffix, average in self.averages.items()
        }
        if self.master is None:
            return state
        is_master = iterate.data_ptr() == self.master[where].data_ptr()
        master = self._lend("master", self.master)[where] if is_master else iterate
        return state | {"master": self._as_piece(master, position)}

    def _borrow(self, local: Tensor, position: int) -> Tensor:
        """Returns a state tensor with the values of ``local`` (1-D), which is memory that changes in place."""
        if self.layout.world_size == 1:
            return self._as_piece(local.clone(), position)
        piece = self._piece(local, position)
        piece.borrowed = True
        self._borrowers.append(weakref.ref(piece))
        return piece

    def _lend(self, name: str, tensor: Tensor) -> Tensor:
        if self._capturable or not len(tensor):  # CUDA graphs hold the address: a step cannot leave the memory
            return tensor.clone()
        if name not in self._lent or self._lent[name][0] is not tensor:
            # The storage of its own tells those who hold a state dict from those who hold live tensors.
            self._lent[name] = tensor, torch.from_dlpack(tensor)
        return self._lent[name][1]

    def _copy_lent(self) -> None:
        """Copies what a state dict still holds, before it changes: a state dict is of one moment."""
        if not (self._borrowers or self._lent):
            return
        for reference in self._borrowers:
            if (piece := reference()) is not None:
                piece.own()
        self._borrowers.clear()
        for name, (tensor, lent) in self._lent.items():
            if name == "master":
                if self.master is tensor and has_other_users(lent):
                    self.master = tensor.clone()
            elif self.averages[name.removeprefix("ax")] is tensor and has_other_users(lent):
                self.averages[name.removeprefix("ax")] = tensor.clone()
        self._lent.clear()

    def writes_scalars(self, position: int) -> bool:
        """Whether this rank writes the scalars of a parameter to checkpoints: the owner of its first element does."""
        placement, piece = self.placements[position], self.pieces.get(position)
        has_first = piece is not None and piece.start == 0 and not any(placement.offsets)
        return has_first or not math.prod(placement.whole)

    def _where(self, position: int) -> slice:
        """Returns where one parameter lies in the shard; an empty slice if it lies in other shards."""
        piece = self.pieces.get(position)
        return slice(0, 0) if piece is None else slice(piece.shard_start, piece.shard_stop)

    def _as_piece(self, local: Tensor, position: int) -> Tensor:
        if self.layout.world_size == 1:
            return self.parameters.wrap(position, self.placements[position].view(local))
        return self._piece(local, position)

    def _piece(self, local: Tensor, position: int) -> StatePiece:
        piece = self.pieces.get(position)
        return StatePiece(local, 0 if piece is None else piece.start, self.placements[position])

    def check_state(self, position: int, state: Mapping[str, Any]) -> None:
        """Raises ``ValueError``, which names the mismatch, where ``state`` does not fit parameter ``position``."""
        dtypes = {f"ax{suffix}": self.average_dtype for suffix in self.averages}
        dtypes |= {"master": compute_dtype(self.dtype)}
        check_state(state, dtypes, self.placements[position], self.pieces.get(position))

    def load_state(self, states: Mapping[int, Mapping[str, Any]]) -> None:
        """Loads states that ``check_state`` has passed, by position; parameters without one start without state."""
        self._copy_lent()
        scalars = [self._scalars_in(states[p]) if p in states else self._fresh for p in range(len(self.placements))]
        self._set_runs(merge_runs([Run(p, p + 1, value) for p, value in enumerate(scalars)]))
        averages = {suffix: self.average_copy(suffix) for suffix in self.averages if states}
        if states:
            self._make_master()
        for position in self.pieces:
            self._load_tensors(position, states.get(position, {}), averages)
        for suffix, kept in self.averages.items():
            loaded = averages.get(suffix)
            if self._capturable and kept is not None:
                kept.copy_(self._iterate() if loaded is None else loaded)  # CUDA graphs hold the address
                continue
            # An average that has not started is dropped to save its memory, unless it differs from the parameters.
            if loaded is not None and not self.has_average(suffix):
                loaded = None if torch.equal(loaded, self._iterate().to(loaded)) else loaded
            self.averages[suffix] = loaded

    def _load_tensors(self, position: int, state: Mapping[str, Any], averages: Mapping[str, Tensor]) -> None:
        """Copies the tensors of one parameter's ``state`` to ``averages`` and the master."""
        where = self._where(position)
        for suffix, average in averages.items():
            # An average that the state lacks has not started: its value is the one of the first average.
            if (saved := state.get(f"ax{suffix}", state.get("ax"))) is not None:
                average[where].copy_(self._cut(saved, position))
        if self.master is not None:
            master = state.get("master")
            self.master[where].copy_(self._trained(where) if master is None else self._cut(master, position))

    def _scalars_in(self, state: Mapping[str, Any]) -> Scalars:
        mus = tuple(float(state.get(f"mu{suffix}", 1)) for suffix in self.averages)
        return Scalars(int(state["step"]), float(state["eta"]), mus)

    def _set_runs(self, runs: Sequence[Run]) -> None:
        if not self._capturable:
            self.runs = list(runs)
        elif [(run.first, run.stop) for run in runs] == [(run.first, run.stop) for run in self.runs]:
            for old, new in zip(self.runs, runs, strict=True):
                if isinstance(old.scalars, DeviceScalars):
                    old.scalars.set_(new.scalars.read())  # CUDA graphs hold the addresses
        else:
            device = self.parameters.device
            self.runs = [replace(run, scalars=DeviceScalars.of(run.scalars.read(), device)) for run in runs]

    def _cut(self, value: Tensor, position: int) -> Tensor:
        piece = self.pieces[position]
        if isinstance(value, StatePiece):
            return value.local
        placement = self.placements[position]
        return placement.flatten(placement.block_of(value))[piece.start : piece.stop]


def _scalars(run: Run, h: Hyperparameters) -> Scalars:
    return current_scalars(h, run.scalars.read())


def _difference_norms(values: Tensor, average: Tensor) -> Iterator[Tensor]:
    """Yields the 2-norms, 0-dim and fp64, of the difference of 1-D tensors, block by block."""
    dtype = torch.promote_types(average.dtype, torch.float64)
    for part, other in zip(values.split(DIFFERENCE_BLOCK), average.split(DIFFERENCE_BLOCK), strict=True):
        yield torch.linalg.vector_norm(part.to(other.device, dtype) - other)


def _has_begun(runs: Sequence[Run], number: int) -> bool:
    """Whether a parameter of ``runs`` has started the average with that number."""
    for run in runs:  # noqa: SIM110 (a generator for any() takes twice as long, and every bucket asks in every step)
        if run.scalars.read().mus[number] != 1:
            return True
    return False
