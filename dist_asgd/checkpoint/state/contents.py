"""Live state as the contents of a checkpoint, and as the destination of one.

State is a nested dict of modules, optimizers, LR schedulers, anything with ``state_dict()`` and ``load_state_dict()``,
tensors, and values that ``values`` knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_asgd.checkpoint.format.entries import SavedTensor, TensorEntry
from dist_asgd.checkpoint.format.json_values import encode
from dist_asgd.checkpoint.state.load_plan import OTHERS, Finish, LoadPlan, missing, plain_tensor
from dist_asgd.checkpoint.state.mismatches import Problems
from dist_asgd.checkpoint.state.modules import module_state, plan_module
from dist_asgd.checkpoint.state.optimizer_names import by_parameter_names
from dist_asgd.checkpoint.state.optimizers import plan_optimizer
from dist_asgd.checkpoint.state.rng import RandomState, warn_unchanged
from dist_asgd.checkpoint.state.tensor_blocks import is_sharded, to_save
from dist_asgd.checkpoint.state.tree import Keys, Leaf, Path, has_state, key_of, leaves, restored, tree_of


@dataclass(frozen=True, slots=True)
class Contents:
    """What one rank brings to a checkpoint, by key."""

    tensors: dict[str, TensorEntry]  # blocks are live memory
    values: dict[str, Any]  # encoded: what ``json.dumps(..., allow_nan=False)`` takes
    paths: dict[str, Path]  # of all of them, in the nested state
    varying: frozenset[str]  # may differ between ranks: all but modules, optimizers, LR schedulers, sharded tensors


@dataclass(frozen=True, slots=True)
class Destination:
    """Where the entries of a checkpoint go.

    ``tensors`` has, for the key of an entry of the checkpoint, every place that it is to be read into: there are
    several where weights are tied, or where an average is read into parameters.
    """

    tensors: dict[str, list[TensorEntry]]
    problems: Problems
    finishers: tuple[Finish, ...]

    def finish(self) -> None:
        """After the tensors were filled: gives what was read to modules, optimizers and the others.

        Collective where their ``load_state_dict`` is, as that of ShardedASGD and under FSDP1.
        """
        for finish in self.finishers:
            finish()


def contents_of(state: Mapping[str, Any]) -> Contents:
    """What this rank brings to a checkpoint of ``state``. No tensor is copied. Collective under FSDP1 only.

    Raises:
        TypeError: for what a checkpoint cannot hold, with its key.
        ValueError: where parameters of an optimizer have no names, or two entries have the same key.
    """
    contents = Contents({}, {}, {}, frozenset())
    varying = set()
    for leaf in leaves(state):
        for part in _parts(leaf, state):
            key = key_of(part.path)
            if key in contents.paths:
                raise ValueError(f"two entries have the key {key}: {contents.paths[key]} and {part.path}. Rename one")
            contents.paths[key] = part.path
            if isinstance(part.value, Tensor):
                contents.tensors[key] = to_save(key, part.value)
            else:
                value = part.value.keys if isinstance(part.value, Keys) else part.value
                contents.values[key] = encode(value, key)
            shared = (nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
            if not (isinstance(leaf.value, shared) or is_sharded(part.value)):
                varying.add(key)
    return Contents(contents.tensors, contents.values, contents.paths, frozenset(varying))


def destination_of(
    state: Mapping[str, Any],
    saved: Mapping[str, SavedTensor],
    values: Mapping[str, Any],
    paths: Mapping[str, Path],
    *,
    strict: bool = True,
    average: bool | str = False,
    stock: bool = False,
) -> Destination:
    """Where this rank's part of a checkpoint goes in ``state``. Changes nothing. Collective under FSDP1 only.

    Args:
        state: as for ``contents_of``. Of the checkpoint only what has its top-level names is asked for. A dict in it
            that is empty takes all that the checkpoint has there; an empty state takes the whole checkpoint.
        saved: the tensors that the checkpoint has for this rank, by key.
        values: the values that it has for this rank, by key. They are asked for as they are needed.
        paths: of all entries of the checkpoint, by key, also of those that only other ranks have.
        strict: whether entries that are missing or unexpected are problems.
        average: parameters of modules take the ``ax`` that the optimizer of the checkpoint has of them, if it has one,
            rounded once if it is wider; a name: that one of several averages.
        stock: whether ``torch.distributed.checkpoint`` took the state apart.

    Raises:
        CheckpointError: from ``values``.
        TypeError, ValueError: as ``contents_of``.
    """
    plan = LoadPlan(saved, values, tree_of(paths), strict, stock)
    for leaf in leaves(state) if state else [Leaf((), state, None, None)]:
        _plan_leaf(plan, leaf, state, average)
    plan.note_unexpected(set(map(str, state)))
    finishers = [finish for _, finish in sorted(plan.finishers, key=lambda item: item[0])]
    return Destination(plan.fills, plan.problems, tuple(finishers))


def _modules(state: Mapping[str, Any]) -> dict[Path, nn.Module]:
    return {leaf.path: leaf.value for leaf in leaves(state) if isinstance(leaf.value, nn.Module)}


def _parts(leaf: Leaf, state: Mapping[str, Any]) -> Iterator[Leaf]:
    """What there is to save of a leaf of the state."""
    value = leaf.value
    if isinstance(value, nn.Module):
        return leaves(module_state(value), leaf.path)
    if isinstance(value, torch.optim.Optimizer):
        return leaves(by_parameter_names(leaf.path, value, _modules(state)).state_dict(), leaf.path)
    if has_state(value):
        return leaves(value.state_dict(), leaf.path)
    return iter([leaf])


def _plan_leaf(plan: LoadPlan, leaf: Leaf, state: Mapping[str, Any], average: bool | str) -> None:
    value, path = leaf.value, leaf.path
    if isinstance(value, nn.Module):
        plan_module(plan, path, value, average)
    elif isinstance(value, torch.optim.Optimizer):
        plan_optimizer(plan, path, by_parameter_names(path, value, _modules(state)))
    elif has_state(value):
        _plan_stateful(plan, path, value)
    elif isinstance(value, Keys):
        plan.used.add(key_of(path))
    elif isinstance(value, Tensor):
        if plan.fits(key_of(path), value):
            plan.fill(key_of(path), value)
    elif isinstance(value, Mapping) and not value:
        _plan_empty(plan, leaf)
    else:
        _plan_value(plan, leaf)


def _plan_stateful(plan: LoadPlan, path: Path, target: Any) -> None:
    """All that was saved goes to its ``load_state_dict``, which knows what it wants."""
    node = plan.root.at(path)
    if isinstance(target, RandomState) and not plan.has(node.at(("generators",))):
        plan.used.update(node.entries())
        plan.finish_with(OTHERS, lambda: warn_unchanged(key_of(path)))
        return
    if plan.is_stock and node.key is not None and not node.children:
        plan.used.add(node.key)
        plan.problems.wrong_dtype[node.key] = (
            f"found a tensor or a value, expected the state of {type(target).__name__}"
        )
        return
    # Otherwise it is not asked: that may be expensive.
    is_asked = plan.is_stock or any(key in plan.tensors for key in node.entries())
    state = target.state_dict() if is_asked else {}
    if not list(node.entries()):
        if state or not plan.is_stock:
            missing(plan, path, type(target).__name__)
        return
    live = {key_of(leaf.path): leaf.value for leaf in leaves(state, path)}

    def tensor_for(key: str, saved: SavedTensor) -> Tensor | None:
        known = live.get(key)
        if isinstance(known, Tensor) and (is_sharded(known) or _alike(known, saved)):
            return known if plan.fits(key, known) else None
        return plain_tensor(key, saved)

    taken = plan.take(node, tensor_for)
    if taken is not None:
        plan.finish_with(OTHERS, lambda: target.load_state_dict(restored(taken(), state) if plan.is_stock else taken()))


def _alike(tensor: Tensor, saved: SavedTensor) -> bool:
    return tuple(tensor.shape) == saved.shape and tensor.dtype == saved.dtype


def _plan_empty(plan: LoadPlan, leaf: Leaf) -> None:
    """An empty dict takes all that there is."""
    node = plan.root.at(leaf.path)
    if not list(node.entries()):
        if leaf.path and not plan.is_stock:
            plan.lacks(key_of(leaf.path), "expected a dict")
        return
    taken = plan.take(node, plain_tensor)
    if taken is not None:
        plan.finish_with(OTHERS, lambda: _put(leaf, taken()))


def _plan_value(plan: LoadPlan, leaf: Leaf) -> None:
    key, node = key_of(leaf.path), plan.root.at(leaf.path)
    plan.used.add(key)
    if plan.is_stock and node.children:
        taken = plan.take(node, plain_tensor)
        if taken is not None:
            plan.finish_with(OTHERS, lambda: _put(leaf, restored(taken(), leaf.value)))
    elif key in plan.values:
        value = plan.values[key]
        plan.finish_with(OTHERS, lambda: _put(leaf, value))
    elif key in plan.tensors:
        plan.problems.wrong_dtype[key] = f"found a tensor, expected a value like the {type(leaf.value).__name__} there"
    else:
        plan.lacks(key, f"expected a value like the {type(leaf.value).__name__} there")


def _put(leaf: Leaf, value: Any) -> None:
    """Into the dict that is there, if there is one and it is to be one: others may have it, too."""
    if isinstance(leaf.value, dict) and type(value) is type(leaf.value):
        leaf.value.clear()
        leaf.value.update(value)
    else:
        leaf.container[leaf.place] = value
