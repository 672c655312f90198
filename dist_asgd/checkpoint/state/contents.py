"""Converts live state into the contents of a checkpoint, and plans how a checkpoint is loaded into live state.

State is a nested dict of modules, optimizers, LR schedulers, anything with ``state_dict()`` and ``load_state_dict()``,
tensors, and values that ``checkpoint/format/json_values.py`` can encode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_asgd.checkpoint.format.entries import SavedTensor, TensorEntry
from dist_asgd.checkpoint.format.json_values import encode
from dist_asgd.checkpoint.state.load_plan import OTHERS, Callback, LoadPlan, known_or_new
from dist_asgd.checkpoint.state.mismatches import Problems
from dist_asgd.checkpoint.state.module_names import fqn_of, parameter_names
from dist_asgd.checkpoint.state.modules import module_state, plan_module
from dist_asgd.checkpoint.state.optimizer_names import named_optimizer
from dist_asgd.checkpoint.state.optimizers import plan_optimizer
from dist_asgd.checkpoint.state.plain_data import plan_plain
from dist_asgd.checkpoint.state.rng import RandomState, warn_unchanged
from dist_asgd.checkpoint.state.sharing import HasBuffers, Sharing, subgroup_of
from dist_asgd.checkpoint.state.steps import CountsSteps, StepsTaken
from dist_asgd.checkpoint.state.tensor_blocks import is_sharded, to_save
from dist_asgd.checkpoint.state.tree import (
    Leaf,
    Outline,
    Path,
    destinations,
    has_state,
    key_of,
    leaves,
    tree_of,
    with_types_of,
)


@dataclass(frozen=True, slots=True)
class Contents:
    """The entries that one rank contributes to a checkpoint, by key."""

    tensors: dict[str, TensorEntry]  # with the blocks that this rank saves; they are live memory
    values: dict[str, Any]  # encoded, so that json.dumps(..., allow_nan=False) accepts them
    paths: dict[str, Path]  # of all tensors and values, in the nested state
    sharing: dict[str, Sharing]  # of all entries
    # The optimizer's key, and the global ranks that share it, of entries with Sharing.SUBGROUP.
    subgroups: dict[str, tuple[str, tuple[int, ...]]]
    facts: dict[str, str]  # what must be equal on all ranks besides entries, by what errors call it
    steps: dict[str, StepsTaken]  # what each optimizer has done, by its key


@dataclass(frozen=True, slots=True)
class Destination:
    """The live state that a checkpoint is loaded into, as one rank plans it."""

    # The tensors that each entry is read into, by the entry's key. An entry has several where weights are tied, or
    # where it is an average that is read into parameters.
    tensors: dict[str, list[TensorEntry]]
    problems: Problems  # mismatches found by this rank; nothing may be loaded if any rank has some
    used: Collection[str]  # keys of entries that the state takes
    # Ranks that have saved their own of what a leaf of the state takes, by the leaf's key.
    owners: Mapping[str, Sequence[int]]
    callbacks: tuple[Callback, ...]  # for ``finish``, in order
    skipped: Mapping[str, str]  # entries that are not loaded because their shape differs, with a text, by key
    casts: Mapping[str, str]  # entries that are converted to another dtype, with a text, by key

    def finish(self) -> None:
        """Calls ``load_state_dict`` of modules, optimizers and other objects, and puts values into their dicts.

        To be called once all ``tensors`` are filled. Collective where a ``load_state_dict`` is, such as that of
        ShardedASGD and that of optimizers of FSDP1's parameters.
        """
        for callback in self.callbacks:
            callback()


def contents_of(state: Mapping[str, Any]) -> Contents:
    """Returns the entries that this rank contributes to a checkpoint of ``state``. Copies no tensor.

    Collective only where the state has a module wrapped in FSDP1.

    Raises:
        TypeError: for what a checkpoint cannot hold; the message has its key.
        ValueError: where a parameter of an optimizer has no name, two entries have the same key, or a ``PerRank`` has
            a tensor that is sharded over ranks.
    """
    contents = Contents({}, {}, {}, {}, {}, {}, {})
    for leaf in leaves(state):
        if isinstance(leaf.value, CountsSteps):
            contents.steps[key_of(leaf.path)] = leaf.value.steps_taken()
        sharing_of = _sharing(leaf)
        subgroup = subgroup_of(leaf.value)
        names_with_state = []
        for part in _parts_to_save(leaf, state):
            key = key_of(part.path)
            if key in contents.paths:
                raise ValueError(f"two entries have the key {key}: {contents.paths[key]} and {part.path}. Rename one")
            contents.paths[key] = part.path
            if isinstance(part.value, Tensor):
                contents.tensors[key] = to_save(key, part.value)
                if leaf.per_rank:
                    _check_whole(key, contents.tensors[key])
            else:
                value = part.value.value if isinstance(part.value, Outline) else part.value
                contents.values[key] = encode(value, key)
            contents.sharing[key] = sharing_of(part)
            if contents.sharing[key] is Sharing.SUBGROUP:
                contents.subgroups[key] = key_of(leaf.path), subgroup
            names_with_state.append(key)
        if isinstance(leaf.value, torch.optim.Optimizer) and sharing_of(leaf) is Sharing.EQUAL:
            fact = f"which state {key_of(leaf.path)} has"  # a rank may lack state that others have
            contents.facts[fact] = repr(sorted(names_with_state))
    return contents


def _sharing(leaf: Leaf) -> Callable[[Leaf], Sharing]:
    """Returns what tells the sharing of each part of ``leaf``."""
    value = leaf.value
    if leaf.per_rank:
        return lambda part: Sharing.OWN
    if isinstance(value, torch.optim.Optimizer):
        return lambda part: Sharing.SUBGROUP if subgroup_of(value) else Sharing.EQUAL
    if isinstance(value, nn.Module):
        params = parameter_names(value).keys()
        buffers = {fqn_of(value, name) for name, _ in value.named_buffers(remove_duplicate=False)}

        def of_module(part: Leaf) -> Sharing:
            name = key_of(part.path[len(leaf.path) :])
            is_parameter = name in params or (is_sharded(part.value) and name not in buffers)  # FSDP1 renames its own
            return Sharing.EQUAL if is_parameter else Sharing.FIRST

        return of_module
    if isinstance(value, HasBuffers):
        own = len(leaf.path)
        return lambda part: Sharing.FIRST if value.is_buffer(part.path[own:]) else _of_others(part)
    return _of_others


def _of_others(part: Leaf) -> Sharing:
    return Sharing.EQUAL if is_sharded(part.value) else Sharing.VARYING


def _check_whole(key: str, entry: TensorEntry) -> None:
    if sum(block.box.numel for block in entry.blocks) != math.prod(entry.shape):
        raise ValueError(
            f"{key} is in a PerRank and sharded over ranks: no rank has it whole. Give each group of ranks a name of "
            "its own. ShardedASGD(process_group=...) keeps its state for each process group without PerRank"
        )


def destination_of(
    state: Mapping[str, Any],
    saved: Mapping[str, SavedTensor],
    values: Mapping[str, Any],
    paths: Mapping[str, Path],
    owners: Mapping[str, Sequence[int]] | None = None,
    *,
    viewers: Collection[Path] = (),
    strict: bool = True,
    average: bool | str = False,
    cast: bool = False,
    prefix: str = "",
    stock: bool = False,
) -> Destination:
    """Plans how this rank loads a checkpoint into ``state``. Changes nothing and reads no tensor.

    Collective only where the state has a module wrapped in FSDP1.

    Args:
        state: of the kinds of objects that ``contents_of`` takes. Entries of the checkpoint below other top-level
            names than those of ``state`` are ignored. An empty dict in the state takes all entries that the checkpoint
            has below it; an empty state takes the whole checkpoint.
        saved: the tensors that the checkpoint has for this rank, by key.
        values: the values that the checkpoint has for this rank, by key. Only those that are needed are looked up.
        paths: the paths of all entries of the checkpoint, by key, including entries that only other ranks have.
        owners: the ranks that have saved their own, by key of the entry; None if there are no such entries.
        viewers: paths of optimizers on subgroups of the ranks, which take what such a subgroup has saved.
        strict: whether entries that are missing, unexpected or of another shape are problems.
        average: True to load into parameters the averages (``ax``) that the checkpoint's optimizer has of them, rounded
            once if they are wider; the name of one of several averages; False to load parameters.
        cast: whether floating-point tensors are converted to the dtype of the live ones.
        prefix: left out of the names that the checkpoint has for parameters and buffers.
        stock: whether ``torch.distributed.checkpoint`` took the state apart.

    Raises:
        CheckpointError: where looking up a value raises it, because the value is damaged, and where two entries become
            one without the prefix or the names of wrappers.
        TypeError: for live tensors that cannot be written to; the message has the key.
        ValueError: where a parameter of an optimizer has no name, or where averages that were asked for do not exist.
    """
    plan = LoadPlan(saved, values, tree_of(paths), owners or {}, strict, cast, prefix, stock)
    owners_by_leaf: dict[str, Sequence[int]] = {}
    for leaf in destinations(state):
        used, plan.used = plan.used, set()
        _plan_leaf(plan, leaf, state, average)
        own = plan.owners_of_used()
        if leaf.per_rank or leaf.path in viewers:
            owners_by_leaf[key_of(leaf.path)] = own
        elif own and isinstance(leaf.value, (nn.Module, torch.optim.Optimizer)):
            plan.note_owned(key_of(leaf.path), own)
        used |= plan.used
        plan.used = used
    plan.note_unexpected(set(map(str, state)))
    callbacks = [callback for _, callback in sorted(plan.callbacks, key=lambda item: item[0])]
    return Destination(plan.fills, plan.problems, plan.used, owners_by_leaf, tuple(callbacks), plan.skipped, plan.casts)


def _modules(state: Mapping[str, Any]) -> dict[Path, nn.Module]:
    return {leaf.path: leaf.value for leaf in leaves(state) if isinstance(leaf.value, nn.Module)}


def _parts_to_save(leaf: Leaf, state: Mapping[str, Any]) -> Iterator[Leaf]:
    """Yields the leaves of the state of a module, an optimizer or a stateful object; else the leaf itself."""
    value = leaf.value
    if isinstance(value, nn.Module):
        return leaves(module_state(value), leaf.path)
    if isinstance(value, torch.optim.Optimizer):
        return leaves(named_optimizer(leaf.path, value, _modules(state)).state_dict(), leaf.path)
    if has_state(value):
        return leaves(value.state_dict(), leaf.path)
    return iter([leaf])


def _plan_leaf(plan: LoadPlan, leaf: Leaf, state: Mapping[str, Any], average: bool | str) -> None:
    value, path = leaf.value, leaf.path
    if isinstance(value, nn.Module):
        plan_module(plan, path, value, average)
    elif isinstance(value, torch.optim.Optimizer):
        modules = _modules(state)
        plan_optimizer(plan, path, named_optimizer(path, value, modules), modules)
    elif has_state(value):
        _plan_stateful(plan, path, value)
    elif isinstance(value, Outline):
        plan.used.add(key_of(path))
    else:
        plan_plain(plan, leaf)


def _plan_stateful(plan: LoadPlan, path: Path, target: Any) -> None:
    """Plans to give ``load_state_dict`` of ``target`` all that was saved below ``path``, whatever its state is now."""
    node = plan.root.at(path)
    if isinstance(target, RandomState) and not plan.has_all(node.at(("generators",))):
        plan.used.update(node.entry_keys())
        plan.after_read(OTHERS, lambda: warn_unchanged(key_of(path)))
        return
    if plan.is_stock and node.key is not None and not node.children:
        plan.used.add(node.key)
        plan.problems.wrong_dtype[node.key] = (
            f"found a tensor or a value, expected the state of {type(target).__name__}"
        )
        return
    # state_dict() may be expensive: it is called only for live tensors to read into, or for the types that DCP drops.
    needs_state = plan.is_stock or any(key in plan.tensors for key in node.entry_keys())
    state = target.state_dict() if needs_state else {}
    if not list(node.entry_keys()):
        if state or not plan.is_stock:
            plan.note_missing(key_of(path), f"expected the state of {type(target).__name__}")
        return
    live = {key_of(leaf.path): leaf.value for leaf in leaves(state, path)}
    loaded = plan.read_subtree(node, known_or_new(plan, live))
    if loaded is not None:
        plan.after_read(
            OTHERS, lambda: target.load_state_dict(with_types_of(state, loaded()) if plan.is_stock else loaded())
        )
