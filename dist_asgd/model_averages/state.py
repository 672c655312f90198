"""Conversion between the shards of averages and the state dict of ``ShardedAverages``, sharded and whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dist_asgd.asgd.schedule import Scalars
from dist_asgd.averages.options import PROGRESS
from dist_asgd.buckets.averaged import AveragedBucket
from dist_asgd.comm.consensus import Agreement, Facts
from dist_asgd.sharding.layout import Piece
from dist_asgd.sharding.placement import Placement
from dist_asgd.sharding.sharded_state import StatePiece
from dist_asgd.step.validation import some_of

Slices = Mapping[int, tuple[Placement, slice]]  # FSDP1's slices: the whole parameter, and the place in it, flattened


@dataclass(frozen=True, slots=True)
class Member:
    """A parameter of ``ShardedAverages``, and where its average is."""

    names: Sequence[str]  # in the model; several where weights are tied
    bucket: AveragedBucket
    position: int  # in the bucket

    @property
    def param(self) -> Tensor:
        return self.bucket.params[self.position]

    @property
    def is_averaged(self) -> bool:
        """Whether an average has an iterate of the parameter, or gets one from the next update."""
        return self.param.requires_grad or bool(self.iterates)

    @property
    def iterates(self) -> int:
        """The iterates that averages of the parameter have taken."""
        return self.bucket.shard.step_of(self.position)


def members_of(buckets: Sequence[AveragedBucket], aliases: Mapping[str, Sequence[str]]) -> list[Member]:
    """Returns all parameters of ``buckets``, in the order of ``aliases``, their names by the first name of each."""
    found = {
        name: Member(aliases[name], bucket, position)
        for bucket in buckets
        for position, name in enumerate(bucket.names)
    }
    return [found[name] for name in aliases]


def sharded_averages(members: Sequence[Member], suffixes: Mapping[str, str], slices: Slices) -> dict[str, Any]:
    """Returns the averages by name and then by the names of parameters; several ranks have pieces. Sends nothing.

    Args:
        members: the parameters whose averages are wanted.
        suffixes: the suffix of each average in the state, by its name.
        slices: FSDP1's slices by ``id``.
    """
    state: dict[str, dict[str, Tensor]] = {average: {} for average in suffixes}
    for member in members:
        found = member.bucket.state_of(member.position)
        for average, suffix in suffixes.items():
            value = found[suffix]
            if id(member.param) in slices:
                whole, where = slices[id(member.param)]
                value = StatePiece(value.reshape(-1), where.start, whole)
            state[average] |= dict.fromkeys(member.names, value)
    return state


def iterates_of(members: Sequence[Member]) -> dict[str, Any]:
    """Returns how many iterates parameters have: the largest number, and the parameters that have another one."""
    counts = {member.names[0]: member.iterates for member in members}
    common = max(counts.values(), default=0)
    return {"iterates": common, "others": {name: count for name, count in counts.items() if count != common}}


@torch.no_grad()
def whole_averages(members: Sequence[Member], suffix: str, agreement: Agreement, slices: Slices) -> dict[str, Tensor]:
    """Returns one average as whole CPU tensors, by the names of parameters, on rank 0; ``{}`` on others. Collective.

    Args:
        members: all parameters. One without an average counts as its own average.
        suffix: the suffix of the average in the state.
        agreement: among the ranks that share the averages.
        slices: FSDP1's slices by ``id``.
    """
    owned: list[tuple[str, int, int, slice, Placement]] = []  # name, start in the block, number, place in its flat
    flats: dict[int, tuple[int, Tensor]] = {}  # number and average of each bucket's shard, by ``id``
    whole: dict[str, Tensor] = {}
    for member in members:
        bucket = member.bucket
        if id(bucket) not in flats:
            flats[id(bucket)] = len(flats), bucket.shard.average_copy(suffix).cpu()
        number, flat = flats[id(bucket)]
        placement, start = slices.get(id(member.param), (bucket.placements[member.position], slice(0, 0)))
        piece: Piece | None = bucket.shard.pieces.get(member.position)
        if piece is not None:
            where = slice(piece.shard_start, piece.shard_stop)
            owned.append((member.names[0], start.start + piece.start, number, where, placement))
        if agreement.rank == 0:
            whole |= dict.fromkeys(member.names, placement.new_whole(flat.dtype))
    for pieces, found in agreement.collect(owned, [flat for _, flat in flats.values()]):
        for name, first, number, where, placement in pieces:
            placement.fill(whole[name], first, found[number][where])
    return whole


@dataclass(frozen=True, slots=True)
class AveragesLoad:
    """A validated state dict, matched with the parameters. Nothing changes before ``apply``."""

    states: list[tuple[AveragedBucket, dict[int, dict[str, Any]]]]
    buffers: dict[str, dict[str, Tensor]]  # by average, then by buffer
    progress: Mapping[str, Any]
    facts: Facts = field(default_factory=list)

    @torch.no_grad()
    def apply(self) -> None:
        """Copies the averages into the shards."""
        for bucket, states in self.states:
            bucket.shard.load_state(states)


def plan_load(
    members: Sequence[Member],
    suffixes: Mapping[str, str],
    kinds: Mapping[str, str],
    optimizers: int,
    buffers: Sequence[str],
    state_dict: Mapping[str, Any],
    slices: Slices,
    scalars_of: Callable[[Member, Mapping[str, Any], int], Scalars],
) -> AveragesLoad:
    """Validates a state dict and matches it with the parameters, by name. Changes nothing.

    Args:
        members: all parameters.
        suffixes: the suffix of each average in the state, by its name.
        kinds: the kind of each average as text, by its name.
        optimizers: the number of timings, one for each optimizer that is followed.
        buffers: the names of the buffers that the averages have.
        state_dict: what ``ShardedAverages.state_dict()`` has returned, sharded or whole.
        slices: FSDP1's slices by ``id``.
        scalars_of: returns the scalars of a parameter after a number of iterates, given the saved progress.

    Raises:
        ValueError, TypeError: it does not fit; the message has the names.
    """
    progress = _progress(state_dict, kinds, optimizers)
    _check_names(members, suffixes, buffers, state_dict)
    others = dict(progress.get("others") or {})
    states: dict[int, tuple[AveragedBucket, dict[int, dict[str, Any]]]] = {}
    facts: Facts = []
    for member in members:
        plan = states.setdefault(id(member.bucket), (member.bucket, {}))[1]
        if member.names[0] not in state_dict[next(iter(suffixes))]:
            continue
        iterates = int(others.get(member.names[0], progress["iterates"]))
        scalars = scalars_of(member, progress, iterates)
        state: dict[str, Any] = {"step": iterates, "eta": 0.0}
        for (average, suffix), mu in zip(suffixes.items(), scalars.mus, strict=True):
            value = state_dict[average][member.names[0]]
            state |= {f"ax{suffix}": _local(value, member, slices), f"mu{suffix}": mu}
        try:
            member.bucket.shard.check_state(member.position, state)
        except ValueError as error:
            raise ValueError(f"the average of parameter {member.names[0]!r} {error}") from None
        plan[member.position] = state
        facts.append((f"the iterates of parameter {member.names[0]!r}", str(iterates)))
    found = {average: {name: state_dict[average][name] for name in buffers} for average in suffixes}
    return AveragesLoad(list(states.values()), found, progress, facts)


def _progress(state_dict: Mapping[str, Any], kinds: Mapping[str, str], optimizers: int) -> Mapping[str, Any]:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"load_state_dict() needs a state dict on every rank, got {type(state_dict).__name__}")
    progress = state_dict.get(PROGRESS)
    if not isinstance(progress, Mapping) or "kinds" not in progress:
        raise ValueError(f"the state dict has no {PROGRESS!r}: it is not that of ShardedAverages")
    if dict(progress["kinds"]) != dict(kinds):
        raise ValueError(
            f"the state dict has the averages {dict(progress['kinds'])}, and these are {dict(kinds)}: build "
            "ShardedAverages with those of the state dict"
        )
    if len(progress["timings"]) != optimizers:
        raise ValueError(
            f"the state dict follows {len(progress['timings'])} optimizers, these averages {optimizers}: pass as many "
            "to ShardedAverages"
        )
    return progress


def _check_names(
    members: Sequence[Member], suffixes: Mapping[str, str], buffers: Sequence[str], state_dict: Mapping[str, Any]
) -> None:
    expected = {name for member in members if member.is_averaged for name in member.names[:1]} | set(buffers)
    known = {name for member in members for name in member.names} | set(buffers)
    for average in suffixes:
        found = state_dict.get(average)
        if not isinstance(found, Mapping):
            raise ValueError(f"the state dict has no average {average!r}; it has {sorted(map(str, state_dict))}")
        if missing := sorted(expected - found.keys()):
            raise ValueError(f"the average {average!r} of the state dict has no {some_of(missing)}")
        if unknown := sorted(found.keys() - known):
            raise ValueError(
                f"the average {average!r} of the state dict has {some_of(unknown)}, which is not known here"
            )


def _local(value: Any, member: Member, slices: Slices) -> Any:
    """Returns a saved average cut to FSDP1's slice of the parameter, or as it is for other parameters."""
    if id(member.param) not in slices or not isinstance(value, Tensor):
        return value
    whole, where = slices[id(member.param)]
    if isinstance(value, StatePiece):
        if (value.start, value.start + len(value.local)) != (where.start, where.stop):
            raise ValueError(
                f"the average of parameter {member.names[0]!r} has elements [{value.start}, "
                f"{value.start + len(value.local)}), and this rank's slice is [{where.start}, {where.stop}): it was "
                "saved by another rank. torch.distributed.checkpoint and Checkpointer move it between ranks"
            )
        return value.local.view(member.param.shape)
    return whole.flatten(value)[where] if tuple(value.shape) == whole.whole else value
