"""Plans the load of plain data: tensors and values outside of objects, and dicts and lists of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import Tensor

from dist_asgd.checkpoint.format.entries import SavedTensor
from dist_asgd.checkpoint.format.json_values import encode
from dist_asgd.checkpoint.format.plain_types import refill_generator
from dist_asgd.checkpoint.state.load_plan import OTHERS, LoadPlan, empty_cpu_tensor
from dist_asgd.checkpoint.state.tensor_blocks import is_sharded
from dist_asgd.checkpoint.state.tree import Leaf, Path, TreeNode, has_tensors, key_of, with_types_of


def plan_plain(plan: LoadPlan, leaf: Leaf) -> None:
    """Plans to replace plain data by what the checkpoint has at its path, whatever the structure of either is.

    Live tensors are filled, so the checkpoint must have each of them. Where both have a dict, a name that only the
    live dict has is missing, and one that only the checkpoint has is added; but tensors are not added to a dict or
    list that has tensors, whose names are the tensors that are asked for.
    """
    node = _asked_for(plan, leaf.value, plan.root.at(leaf.path))
    tensors: dict[str, Tensor] = {}
    _compare(plan, leaf.value, node, leaf.path, tensors)
    if not leaf.per_rank:
        for key in [key for key, tensor in tensors.items() if is_sharded(tensor) and key in plan.owners]:
            plan.note_owned(key, plan.owners[key])
    if not _has_entries(node):
        return

    def tensor_for(key: str, saved: SavedTensor) -> Tensor:
        return tensors[key] if key in tensors else empty_cpu_tensor(key, saved)

    loaded = plan.read_subtree(node, tensor_for)
    if loaded is not None:
        _check_container(leaf)
        plan.after_read(OTHERS, lambda: _put(plan, leaf, node, loaded()))


def _asked_for(plan: LoadPlan, live: Any, node: TreeNode) -> TreeNode:
    """Returns ``node`` without what is not loaded: tensors that are not added, and what only other ranks have.

    The former remain unexpected, the latter become missing. A list of which other ranks have an item is left out whole.
    """
    if not node.children:
        if node.key is None or node.key in plan.tensors or node.key in plan.values:
            return node
        plan.used.add(node.key)
        plan.note_missing(node.key, "only other ranks have it")
        return TreeNode()
    items: dict[str | int, Any] = {}
    if isinstance(live, Mapping):
        items = {str(key): item for key, item in live.items()}
    elif isinstance(live, list):
        items = dict(enumerate(live))
    is_limited = bool(items) and has_tensors(live)
    children: dict[str | int, TreeNode] = {}
    for name, child in node.children.items():
        if name in items or not (is_limited and any(key in plan.tensors for key in child.entry_keys())):
            children[name] = _asked_for(plan, items.get(name), child)
    kept = {name: child for name, child in children.items() if _has_entries(child)}
    if not kept or (len(kept) < len(children) and all(isinstance(name, int) for name in children)):
        return TreeNode()
    return TreeNode(node.key if node.key in plan.values else None, kept)


def _compare(plan: LoadPlan, live: Any, node: TreeNode, path: Path, tensors: dict[str, Tensor]) -> None:
    """Collects live tensors in ``tensors``, by key, and adds problems for what ``node`` lacks or does not fit."""
    key, is_missing = key_of(path), not _has_entries(node)
    if isinstance(live, Tensor):
        tensors[key] = live
        if node.children:
            plan.problems.wrong_dtype[key] = "found a dict or a list, expected a tensor"
        else:
            plan.fits(key, live)
    elif isinstance(live, Mapping) and live:
        by_name = is_missing or any(isinstance(name, str) for name in node.children)
        for name, item in live.items():
            if by_name or has_tensors(item):
                _compare(plan, item, node.at((str(name),)), (*path, str(name)), tensors)
    elif isinstance(live, list) and has_tensors(live):
        for number, item in enumerate(live):
            if has_tensors(item):
                _compare(plan, item, node.at((number,)), (*path, number), tensors)
    elif is_missing and path and not (plan.is_stock and isinstance(live, Mapping)):  # DCP leaves empty dicts out
        kind = "dict" if isinstance(live, Mapping) else f"value like the {type(live).__name__} there"
        plan.note_missing(key, f"expected a {kind}")


def _has_entries(node: TreeNode) -> bool:
    return next(node.entry_keys(), None) is not None


def _check_container(leaf: Leaf) -> None:
    """Raises ``TypeError`` where the value could not be replaced."""
    fixed = leaf.container is not None and not isinstance(leaf.container, (MutableMapping, list))
    if fixed and not isinstance(leaf.value, Tensor):
        raise TypeError(
            f"{key_of(leaf.path)} is in a {type(leaf.container).__name__}, which cannot be changed: use a dict"
        )


def _put(plan: LoadPlan, leaf: Leaf, node: TreeNode, loaded: Any) -> None:
    value = with_types_of(leaf.value, loaded) if plan.is_stock else loaded
    value = _merged(leaf.value, value, node, plan.refilled)
    if value is not leaf.value:
        leaf.container[leaf.index] = value


def _merged(live: Any, loaded: Any, node: TreeNode, refilled: set[int]) -> Any:
    """Returns ``loaded``, in the live dicts, lists, deques and random generators, to which other objects may refer.

    Args:
        node: has children where ``loaded`` was taken apart; then a dict keeps what only the live one has.
        refilled: the ``id`` of each object that was refilled, which is not done again with other data.
    """
    if id(live) in refilled and not _is_equal(live, loaded):
        return loaded
    if isinstance(loaded, dict) and isinstance(live, MutableMapping) and type(loaded) in (dict, type(live)):
        refilled.add(id(live))
        items = {key: _merged(live.get(key), item, node.at((str(key),)), refilled) for key, item in loaded.items()}
        names = set(map(str, items)) if node.children else {}
        items |= {key: item for key, item in live.items() if node.children and str(key) not in names}
        live.clear()
        for key, item in items.items():
            live[key] = item
        return live
    if isinstance(loaded, (list, tuple, deque)) and isinstance(live, type(loaded)):
        before = [*live, *[None] * len(loaded)]
        found = [_merged(before[number], item, node.at((number,)), refilled) for number, item in enumerate(loaded)]
        if isinstance(live, tuple):
            return tuple(found) if type(loaded) is tuple else loaded
        if isinstance(live, list) or (isinstance(loaded, deque) and live.maxlen == loaded.maxlen):
            refilled.add(id(live))
            live.clear()
            live.extend(found)
            return live
    if not refill_generator(live, loaded):
        return loaded
    refilled.add(id(live))
    return live


def _is_equal(live: Any, loaded: Any) -> bool:
    try:
        return bool(encode(live, "") == encode(loaded, ""))
    except TypeError:  # there are tensors
        return False
