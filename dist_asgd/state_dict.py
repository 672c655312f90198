"""Conversion between the shards of the optimizer's state and torch's state dicts: sharded, whole, and loading both."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_asgd._torch_private import without_wrappers
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
TORCH_OPTIONS = {"foreach", "differentiable", "capturable"}


def sharded_state_dict(groups: Groups, buckets: GroupBuckets) -> dict[str, Any]:
    """Returns torch's state dict, in which ``ax`` and ``master`` are this rank's pieces. Sends nothing.

    Args:
        groups: ``optimizer.param_groups``.
        buckets: the buckets of each group.
    """
    ids, begun = _parameter_ids(groups), has_stepped(buckets)
    state = {}
    for group, of_group in zip(groups, buckets, strict=True):
        for bucket in of_group:
            for position, entry in _bucket_state(bucket, group, begun).items():
                state[ids[id(bucket.params[position])]] = entry
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
            of_bucket = bucket.shard.scalars(Hyperparameters.of(group))
            if not any(scalars.step for scalars in of_bucket):
                continue
            tensors = {key: flat.cpu() for key, flat in bucket.shard.tensors().items()}
            numbers = {key: number for number, key in enumerate(tensors, start=len(flats))}
            flats += tensors.values()
            for position, scalars in enumerate(of_bucket):
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


def state_for_all(
    groups: Groups, buckets: GroupBuckets, former: Agreement, agreement: Agreement, dtypes: Sequence[torch.dtype]
) -> dict[str, Any]:
    """Returns the whole state dict on every rank, to be loaded into other buckets. Collective.

    Args:
        groups: the param groups, with the parameters of ``buckets``.
        buckets: the buckets of each group, none of them of slices.
        former: the ranks that share ``buckets``.
        agreement: the ranks that get the state.
        dtypes: for each parameter, the dtype that its averages are to have.
    """
    whole = full_state_dict(groups, buckets, former)
    for index, state in whole["state"].items() if whole else ():
        averages = [key for key in state if key == "ax" or key.startswith("ax_")]
        state.update({key: state[key].to(dtypes[index]) for key in averages})
    return agreement.broadcast(whole)


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
            facts.append((f"names of the parameters of group {number}", repr(options.get("param_names"))))
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


def plan_load(
    groups: Groups, buckets: GroupBuckets, state_dict: Mapping[str, Any], slices: Mapping[int, tuple[Placement, slice]]
) -> StateDictLoad:
    """Validates a state dict and matches it with parameters, by name or by their order in the groups. Changes nothing.

    Args:
        groups: ``optimizer.param_groups``.
        buckets: the buckets of each group.
        state_dict: state dict of ``ShardedASGD`` or ``torch.optim.ASGD``, sharded or whole, with any parameter ids.
        slices: FSDP1's slices by ``id``: the placement of the whole parameter, and the place in it, flattened.

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
    _refuse_reordered_slices(keys, saved_groups, buckets)
    strangers = saved_state.keys() - {key for of_group in keys for key in of_group}
    if strangers:
        some = some_of(sorted(strangers, key=repr))
        raise ValueError(f"the state dict has state of parameters that none of its groups lists: {some}")
    states = {
        id(param): _cut_to_slice(saved_state[key], *slices[id(param)]) if id(param) in slices else saved_state[key]
        for group, group_keys in zip(groups, keys, strict=True)
        for param, key in zip(group["params"], group_keys, strict=True)
        if saved_state.get(key)
    }
    _check_averages(groups, saved_groups, states.values())
    options = [_loaded_options(n, *pair) for n, pair in enumerate(zip(groups, saved_groups, strict=True))]
    plans = []
    for bucket in (bucket for of_group in buckets for bucket in of_group):
        plan = {p: states[id(param)] for p, param in enumerate(bucket.params) if id(param) in states}
        for position, state in plan.items():
            try:
                bucket.shard.check_state(position, state)
            except ValueError as error:
                hint = ". Whole state can be cut to FSDP1's slices by an optimizer that was given module="
                why = f"{error}{hint if bucket.presharded and id(bucket.params[position]) not in slices else ''}"
                raise ValueError(f"the state of parameter {bucket.names[position]!r} {why}") from None
        plans.append((bucket, plan))
    return StateDictLoad(groups, options, plans)


def _bucket_state(bucket: Bucket, group: Mapping[str, Any], begun: bool) -> dict[int, dict[str, Any]]:
    """Returns the sharded state of each parameter of ``bucket`` that has state, by position.

    Args:
        begun: whether the optimizer has taken a step.
    """
    shard, state = bucket.shard, {}
    of_bucket = enumerate(shard.scalars(Hyperparameters.of(group)))
    with_state = [(position, one) for position, one in of_bucket if has_state(bucket, position, one.step, begun)]
    for position, scalars in with_state:
        entry = scalar_tensors(scalars, bucket)
        if not shard.writes_scalars(position):
            entry = {key: ScalarCopy(value) for key, value in entry.items()}
        state[position] = entry | shard.state_of(position)
    return state


def has_state(bucket: Bucket, position: int, steps: int, begun: bool) -> bool:
    """Whether a parameter has state: it has taken ``steps`` steps, or no parameter has, and it is to be trained.

    Before the first step, torch's ``get_optimizer_state_dict`` makes state for parameters that are to be trained, by a
    fake step. A checkpoint is then loaded into that state.

    Args:
        begun: whether the optimizer has taken a step.
    """
    param = bucket.params[position]
    if bucket.presharded and not param.numel():  # counts steps that the parameter need not have taken on other ranks
        return False
    return steps > 0 or (param.requires_grad and not begun)


def has_stepped(buckets: GroupBuckets) -> bool:
    return any(bucket.shard.has_stepped() for of_group in buckets for bucket in of_group)


def parameters_with_state(groups: Groups, buckets: GroupBuckets) -> set[int]:
    """Returns the ``id`` of each parameter that has state."""
    begun = has_stepped(buckets)
    return {
        id(bucket.params[position])
        for group, of_group in zip(groups, buckets, strict=True)
        for bucket in of_group
        for position, scalars in enumerate(bucket.shard.scalars(Hyperparameters.of(group)))
        if has_state(bucket, position, scalars.step, begun)
    }


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
    return [_ids_by_name(index, *pair) for index, pair in enumerate(zip(groups, saved, strict=True))]


def _ids_by_name(number: int, group: Mapping[str, Any], saved: Mapping[str, Any]) -> list[Any]:
    """Returns the saved ids of group ``number`` in the order of the optimizer's parameters.

    By name where both sides have names, which may have those of wrappers in them; otherwise by position.

    Raises ``ValueError`` where the names are not the optimizer's.
    """
    ids, own, found = list(saved["params"]), group.get("param_names"), _saved_names(number, saved)
    if not own or not found:
        return ids
    own, found = ([without_wrappers(name).removeprefix("module.") for name in names] for names in (own, found))
    missing, unknown = ([name for name in a if name not in set(b)] for a, b in ((own, found), (found, own)))
    if own == found or len(set(own)) < len(own) or (unknown and _has_named_ids(saved)):
        return ids
    if missing or unknown:
        instead = f", and has {some_of(unknown)} instead" if unknown else ""
        raise ValueError(
            f"parameter group {number} of the state dict has no parameter {some_of(missing)}{instead}. Parameters are "
            "matched by name, in whatever order. To match them by position, take 'param_names' out of the state dict's "
            "groups"
        )
    by_name = dict(zip(found, ids, strict=True))
    return [by_name[name] for name in own]


def _refuse_reordered_slices(
    keys: Sequence[Sequence[Any]], saved: Sequence[Mapping[str, Any]], buckets: GroupBuckets
) -> None:
    """Raises ``ValueError`` where FSDP1's slices were saved in another order than the optimizer has them in.

    ``FullyShardedDataParallel.optim_state_dict_to_load`` puts state into the optimizer's order and leaves
    ``param_names`` as saved, so these do not tell which state is whose.
    """
    for number, (own, group, of_group) in enumerate(zip(keys, saved, buckets, strict=True)):
        if own != list(group["params"]) and any(bucket.presharded for bucket in of_group):
            raise ValueError(
                f"parameter group {number} of the state dict names the parameters of FSDP1 in another order than the "
                "optimizer. If its state is in the optimizer's order, as FSDP's optim_state_dict_to_load() puts it, "
                "take 'param_names' out of the state dict's groups"
            )


def _has_named_ids(saved: Mapping[str, Any]) -> bool:
    """Whether the ids of a saved group are names of parameters in their module, as torch's state dict functions make.

    The optimizer may have been given other names.
    """
    return all(isinstance(key, str) for key in saved["params"])


def _saved_names(number: int, saved: Mapping[str, Any]) -> list[str] | None:
    """Returns the names of a saved group's parameters in the order of their ids; None if it has none.

    Raises ``ValueError`` where the group has another number of names than of parameters.
    """
    if saved["params"] and _has_named_ids(saved):  # param_names may then be in another order
        return list(saved["params"])
    names = saved.get("param_names")
    if names and not (len(names) == len(saved["params"]) and all(isinstance(name, str) for name in names)):
        raise ValueError(
            f"parameter group {number} of the state dict has {len(names)} 'param_names' for {len(saved['params'])} "
            "parameters: it must have a name for each, or none"
        )
    return list(names) if names else None


def _cut_to_slice(state: Mapping[str, Any], whole: Placement, where: slice) -> dict[str, Any]:
    """Returns the state of one parameter with its whole tensors cut to the slice that FSDP1 has made of it.

    Args:
        whole: the placement of the whole parameter; tensors of another shape stay.
        where: the place of the slice in the whole parameter, flattened.
    """
    return {
        key: whole.flatten(value)[where] if type(value) is Tensor and value.shape == whole.shape else value
        for key, value in state.items()
    }


def _check_averages(groups: Groups, saved: Sequence[Mapping[str, Any]], states: Iterable[Mapping[str, Any]]) -> None:
    """Raises ``ValueError`` where the saved state has begun averages of another kind than the optimizer's."""
    for index, (group, other) in enumerate(zip(groups, saved, strict=True)):
        found, expected = average_of(other), average_of(group)
        if not same_averages(found, expected) and any(map(has_begun, states)):
            raise ValueError(
                f"parameter group {index} of the state dict averages by {found}, the optimizer by {expected}: build it "
                "with the average of the state dict (average=), or load a state from before averaging began"
            )


def _loaded_options(number: int, group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of the saved options that ``group`` takes over. Raises ``ValueError`` for one out of range."""
    kept = {"params", "param_names", "average", "restarted", *TORCH_OPTIONS}
    options = copy.deepcopy({key: value for key, value in saved.items() if key not in kept})
    options |= {"restarted": saved.get("restarted", False)} if "restarted" in group else {}
    if not group.get("param_names") and (names := _saved_names(number, saved)):
        options["param_names"] = names
    Hyperparameters.of({**group, **options})  # raises where they are out of range
    return options


def passed_through(hooks: Mapping[int, Callable[..., Any]], optimizer: Any, state_dict: Any) -> Any:
    """Returns the state dict after torch's ``hooks``, each of which may change it in place or return another one."""
    for hook in hooks.values():
        returned = hook(optimizer, state_dict)
        state_dict = state_dict if returned is None else returned
    return state_dict
