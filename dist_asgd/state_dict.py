"""Conversion between the shards of the optimizer's state and torch's state dicts: sharded, whole, and loading both."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_asgd.asgd.schedule import Hyperparameters, Scalars, scalar_dtype
from dist_asgd.averages.options import average_of, same_averages
from dist_asgd.buckets.base import Bucket
from dist_asgd.comm.consensus import Agreement, Facts
from dist_asgd.sharding.layout import Piece
from dist_asgd.sharding.placement import Placement
from dist_asgd.sharding.saved_state import has_begun
from dist_asgd.sharding.sharded_state import ScalarCopy
from dist_asgd.step.consistency import option_facts
from dist_asgd.step.validation import Groups, some_of

GroupBuckets = list[list[Bucket]]  # the buckets of each group

# Options of torch.optim.ASGD that choose its implementation. Param groups have them so that torch.optim.ASGD can load
# their state dicts. Only ``capturable`` has a meaning here, and all groups have the optimizer's.
TORCH_OPTIONS = {"foreach": None, "differentiable": False, "capturable": False}


def sharded_state_dict(groups: Groups, buckets: GroupBuckets) -> dict[str, Any]:
    """Returns torch's state dict, in which ``ax`` and ``master`` are this rank's pieces. Sends nothing.

    Args:
        groups: ``optimizer.param_groups``.
        buckets: the buckets of each group.
    """
    ids = _parameter_ids(groups)
    state = {}
    for group, of_group in zip(groups, buckets, strict=True):
        for bucket in of_group:
            for param, entry in zip(bucket.params, _bucket_state(bucket, group), strict=True):
                state[ids[id(param)]] = entry
    return {"state": dict(sorted(state.items())), "param_groups": _exported_groups(groups, ids)}


def full_state_dict(groups: Groups, buckets: GroupBuckets, agreement: Agreement, to: int = 0) -> dict[str, Any]:
    """Returns torch's state dict with whole tensors on the CPU on rank ``to``, and ``{}`` on others. Collective.

    As in torch, a parameter that has not taken a step has no state.

    Args:
        groups: ``optimizer.param_groups``.
        buckets: the buckets of each group, none of them of slices.
        to: the rank that gets it, the same on every rank.
    """
    ids = _parameter_ids(groups)
    state: dict[int, dict[str, Any]] = {}
    owned: list[tuple[int, str, int, Piece, Placement]] = []
    flats: list[Tensor] = []
    for group, of_group in zip(groups, buckets, strict=True):
        for bucket in of_group:
            tensors = {key: flat.cpu() for key, flat in bucket.shard.tensors().items()}
            numbers = {key: number for number, key in enumerate(tensors, start=len(flats))}
            flats += tensors.values()
            for position, scalars in enumerate(bucket.shard.scalars(Hyperparameters.of(group))):
                if not scalars.step:
                    continue
                index, placement = ids[id(bucket.params[position])], bucket.placements[position]
                piece = bucket.shard.pieces.get(position)
                if piece is not None:
                    owned += [(index, key, number, piece, placement) for key, number in numbers.items()]
                if agreement.rank == to:
                    whole = {key: placement.new_whole(flat.dtype) for key, flat in tensors.items()}
                    state[index] = {**scalar_tensors(scalars, bucket), **whole}
    for pieces, found in agreement.collect(owned, flats, to):
        for index, key, number, piece, placement in pieces:
            placement.fill(state[index][key], piece.start, found[number][piece.shard_start : piece.shard_stop])
    if agreement.rank != to:
        return {}
    return {"state": dict(sorted(state.items())), "param_groups": _exported_groups(groups, ids)}


@dataclass(frozen=True, slots=True)
class StateDictLoad:
    """Validated state dict, matched with the optimizer's parameters. Nothing changes before ``apply``."""

    groups: Groups
    options: list[dict[str, Any]]  # the options to load into each group
    states: list[tuple[Bucket, dict[int, Mapping[str, Any]]]]  # each bucket with its parameters' state, by position

    def facts(self) -> Facts:
        """Returns what must be equal on every rank: the options of groups, and the scalars of every parameter."""
        facts: Facts = []
        for number, (group, options) in enumerate(zip(self.groups, self.options, strict=True)):
            facts += option_facts(Hyperparameters.of({**group, **options}), number)
        for bucket, states in self.states:
            if bucket.presharded:  # a rank has state only of slices that have elements
                continue
            for position, name in enumerate(bucket.names):
                state = states.get(position)
                keys = ["step", "eta", *(f"mu{suffix}" for suffix in bucket.shard.averages)]
                found = "none" if state is None else ", ".join(f"{key} {float(state.get(key, 1))!r}" for key in keys)
                facts.append((f"the state of parameter {name!r}", found))
        return facts

    @torch.no_grad()
    def apply(self) -> None:
        """Copies the state into the shards, and the options into the groups. Not collective."""
        for bucket, states in self.states:
            bucket.shard.load_state(states)
        for group, options in zip(self.groups, self.options, strict=True):
            lr = group["lr"]
            group.update(options)
            if group["capturable"]:
                group["lr"] = lr.fill_(float(group["lr"])) if isinstance(lr, Tensor) else float(group["lr"])


def plan_load(groups: Groups, buckets: GroupBuckets, state_dict: Mapping[str, Any]) -> StateDictLoad:
    """Validates a state dict and matches it with parameters, by their order in the groups. Changes nothing.

    Args:
        groups: ``optimizer.param_groups``.
        buckets: the buckets of each group.
        state_dict: state dict of ``ShardedASGD`` or ``torch.optim.ASGD``, sharded or whole, with any parameter ids.

    Raises:
        ValueError: where it does not fit.
        TypeError: where it is not built like a state dict.
    """
    missing = {"state", "param_groups"} - state_dict.keys()
    if missing:
        raise ValueError(f"the state dict has no {' and no '.join(sorted(missing))}: it is not that of an optimizer")
    saved_groups, saved_state = state_dict["param_groups"], state_dict["state"]
    if not (isinstance(saved_state, Mapping) and all(isinstance(entry, Mapping) for entry in saved_state.values())):
        raise TypeError("'state' of the state dict must be a dict that has a dict for each parameter")
    if not (isinstance(saved_groups, (list, tuple)) and all(isinstance(group, Mapping) for group in saved_groups)):
        raise TypeError("'param_groups' of the state dict must be a list of dicts")
    keys = _saved_ids(groups, saved_groups)
    strangers = saved_state.keys() - {key for of_group in keys for key in of_group}
    if strangers:
        some = some_of(sorted(strangers, key=repr))
        raise ValueError(f"the state dict has state of parameters that none of its groups lists: {some}")
    states = {
        id(param): saved_state[key]
        for group, group_keys in zip(groups, keys, strict=True)
        for param, key in zip(group["params"], group_keys, strict=True)
        if saved_state.get(key)
    }
    _check_averages(groups, saved_groups, states.values())
    options = [_loaded_options(group, saved) for group, saved in zip(groups, saved_groups, strict=True)]
    plans = []
    for bucket in (bucket for of_group in buckets for bucket in of_group):
        plan = {p: states[id(param)] for p, param in enumerate(bucket.params) if id(param) in states}
        for position, state in plan.items():
            try:
                bucket.shard.check_state(position, state)
            except ValueError as error:
                raise ValueError(f"the state of parameter {bucket.names[position]!r} {error}") from None
        plans.append((bucket, plan))
    return StateDictLoad(groups, options, plans)


def _bucket_state(bucket: Bucket, group: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the sharded state of each parameter of ``bucket``, by position."""
    shard, state = bucket.shard, []
    tensors = shard.tensors()
    for position, scalars in enumerate(shard.scalars(Hyperparameters.of(group))):
        entry = scalar_tensors(scalars, bucket)
        if not shard.writes_scalars(position):
            entry = {key: ScalarCopy(value) for key, value in entry.items()}
        state.append(entry | {key: shard.piece_of(flat, position) for key, flat in tensors.items()})
    return state


def scalar_tensors(scalars: Scalars, bucket: Bucket) -> dict[str, Tensor]:
    """Returns scalars as 0-dim CPU tensors in torch's dtype; a step beyond fp32's integers is in fp64."""
    dtype = scalar_dtype()
    return {
        "step": torch.tensor(scalars.step, dtype=torch.float64 if scalars.step > 2**24 else dtype, device="cpu"),
        "eta": torch.tensor(scalars.eta, dtype=dtype, device="cpu"),
        **{
            f"mu{suffix}": torch.tensor(mu, dtype=dtype, device="cpu")
            for suffix, mu in zip(bucket.shard.averages, scalars.mus, strict=True)
        },
    }


def _parameter_ids(groups: Groups) -> dict[int, int]:
    params = [param for group in groups for param in group["params"]]
    return {id(param): index for index, param in enumerate(params)}


def _exported_groups(groups: Groups, ids: Mapping[int, int]) -> list[dict[str, Any]]:
    copied = [{key: value.clone() if isinstance(value, Tensor) else value for key, value in g.items()} for g in groups]
    return [{**group, "params": [ids[id(param)] for param in group["params"]]} for group in copied]


def _saved_ids(groups: Groups, saved: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Returns the ids under which each group's parameters were saved, in the order of the optimizer's parameters.

    Raises ``ValueError`` where the groups do not match.
    """
    if len(groups) != len(saved):
        raise ValueError(f"the state dict has {len(saved)} parameter groups, the optimizer {len(groups)}")
    for index, (group, other) in enumerate(zip(groups, saved, strict=True)):
        missing = {"params", "lr", "lambd", "alpha", "t0"} - other.keys()
        if missing:
            absent = ", ".join(sorted(missing))
            raise ValueError(f"parameter group {index} of the state dict has no {absent}: it is not that of an ASGD")
        if len(group["params"]) != len(other["params"]):
            raise ValueError(
                f"parameter group {index} of the state dict has {len(other['params'])} parameters, "
                f"that of the optimizer {len(group['params'])}"
            )
    return [list(group["params"]) for group in saved]


def _check_averages(groups: Groups, saved: Sequence[Mapping[str, Any]], states: Iterable[Mapping[str, Any]]) -> None:
    """Raises ``ValueError`` where the saved state has begun averages of another kind than the optimizer's."""
    for index, (group, other) in enumerate(zip(groups, saved, strict=True)):
        found, expected = average_of(other), average_of(group)
        if not same_averages(found, expected) and any(map(has_begun, states)):
            raise ValueError(
                f"parameter group {index} of the state dict averages by {found}, the optimizer by {expected}: build it "
                "with the average of the state dict (average=), or load a state from before averaging began"
            )


def _loaded_options(group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of the saved options that ``group`` takes over. Raises ``ValueError`` for one out of range."""
    kept = {"params", "param_names", "average", "restarted", *TORCH_OPTIONS}
    options = copy.deepcopy({key: value for key, value in saved.items() if key not in kept})
    options |= {"restarted": saved.get("restarted", False)} if "restarted" in group else {}
    Hyperparameters.of({**group, **options})  # raises where they are out of range
    return options


def passed_through(hooks: Mapping[int, Callable[..., Any]], optimizer: Any, state_dict: Any) -> Any:
    """Returns the state dict after torch's ``hooks``, each of which may change it in place or return another one."""
    for hook in hooks.values():
        returned = hook(optimizer, state_dict)
        state_dict = state_dict if returned is None else returned
    return state_dict
