"""Nested state taken apart into leaves with paths, the tree of a checkpoint's keys, and nested state made of entries.

A path is a tuple of names and list indices; the key of an entry is its path joined by dots, such as
``model.wte.weight``. Both are as in ``torch.distributed.checkpoint`` (DCP).
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

from dist_asgd.checkpoint.format.manifest import MAX_PATH
from dist_asgd.checkpoint.state.sharing import PerRank

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Leaf:
    """A value of nested state that is not taken apart, and its position."""

    path: Path
    value: Any
    container: Any  # the dict or list that holds the value; None for the root of the state
    index: Any  # the key or index of the value in the container
    per_rank: bool = False  # whether it is inside a ``PerRank``


@dataclass(frozen=True, slots=True)
class Outline:
    """What is saved, as an entry of its own, of a mapping that is taken apart and is no dict with strings as keys.

    Attributes:
        value: a tuple of the keys in their order; before them, for a type other than dict, an empty mapping of this
            type, which cannot be a key. Of a list or a mapping whose type a checkpoint cannot hold, the object itself.
    """

    value: Any


@dataclass(slots=True)
class TreeNode:
    """A node of the tree that the paths of a checkpoint's entries form."""

    key: str | None = None  # of the entry with exactly this path, if there is one
    children: dict[str | int, TreeNode] = field(default_factory=dict)

    def at(self, path: Path) -> TreeNode:
        """Returns the node at ``path`` below this one, or an empty node if there is none."""
        node = self
        for name in path:
            node = node.children.get(name) or TreeNode()
        return node

    def entry_keys(self) -> Iterator[str]:
        """Yields the keys of all entries at this node and below."""
        return (key for key, _ in self.entry_paths())

    def entry_paths(self, path: Path = ()) -> Iterator[tuple[str, Path]]:
        """Yields (key, path) of all entries at this node and below; ``path`` is put in front of each path."""
        if self.key is not None:
            yield self.key, path
        for name, child in self.children.items():
            yield from child.entry_paths((*path, name))


def leaves(state: Any, path: Path = ()) -> Iterator[Leaf]:
    """Yields the leaves of nested ``state``, whose own path is ``path``. DCP gives the same paths.

    Mappings are taken apart, and lists that hold a mapping, a tensor, or an object with a state, also in inner lists.
    An empty mapping is a leaf, unless it is the whole state. A ``PerRank`` is taken apart as its value would be.

    DCP makes dicts of all mappings, and strings of all keys. Here a mapping with other keys, or of another type than
    dict, is a leaf if it holds no tensor and no object with a state. If it holds any, it is taken apart; its keys and
    type are then saved beside its leaves, as a leaf ``Outline`` at the mapping's own path.
    """
    return _walk(path, state, None, None)


def destinations(state: Mapping[str, Any]) -> Iterator[Leaf]:
    """Yields what a load of ``state`` treats as one, with paths as ``leaves`` gives them.

    These are objects with a state, and what is outside of them: each tensor, value, dict or list, whole, that holds no
    such object. A dict that is taken apart because it holds one yields an ``Outline`` before what is in it.
    """
    return _walk_destinations((), state, None, None, False) if state else iter([Leaf((), state, None, None)])


def key_of(path: Path) -> str:
    """Returns the key of the entry with this path: its names and indices joined by dots."""
    return ".".join(map(str, path))


def tree_of(paths: Mapping[str, Path]) -> TreeNode:
    """Returns the root of the tree of all ``paths``, given by key."""
    root = TreeNode()
    for key, path in paths.items():
        node = root
        for name in path:
            node = node.children.setdefault(name, TreeNode())
        node.key = key
    return root


def unflatten(node: TreeNode, entries: Mapping[str, Any]) -> Any:
    """Returns the nested state that ``leaves`` has taken apart into ``entries`` (by key), at ``node`` and below."""
    if not node.children:
        return entries[str(node.key)]
    values = {name: unflatten(child, entries) for name, child in node.children.items()}
    if all(isinstance(name, int) for name in values):
        return [value for _, value in sorted(values.items(), key=lambda item: int(item[0]))]
    if node.key is None:
        return values
    outline = list(entries[node.key])
    found: Any = outline.pop(0) if outline and isinstance(outline[0], dict) else {}
    for key in outline:
        if str(key) in values:
            found[key] = values[str(key)]
    return found


def with_types_of(live: Any, value: Any) -> Any:
    """Returns ``value`` with the keys and the types of the mappings that ``live`` has at the same paths.

    DCP makes dicts of all mappings, and strings of all keys. A mapping whose live keys are all ints gets ints for all
    keys that are decimal numbers.
    """
    if isinstance(value, dict) and isinstance(live, Mapping):
        known = {str(key): key for key in live}
        are_numbers = bool(live) and all(type(key) is int for key in live)
        items: dict[Any, Any] = {}
        for name, item in value.items():
            key = known.get(name, int(name) if are_numbers and name.isdecimal() else name)
            items[key] = with_types_of(live.get(key), item)
        if isinstance(live, defaultdict) and type(live) is defaultdict:
            return defaultdict(live.default_factory, items)
        kind: Any = type(live) if type(live) in (OrderedDict, Counter) else dict
        return kind(items)
    if isinstance(value, list) and isinstance(live, list):
        return [with_types_of(live[index] if index < len(live) else None, item) for index, item in enumerate(value)]
    return value


def has_state(value: Any) -> bool:
    """Returns whether ``value`` has a state of its own: a module, or anything with ``state_dict``/``load_state_dict``.

    Optimizers and LR schedulers have these methods, which is all that ``Stateful`` asks for.
    """
    return isinstance(value, (nn.Module, Stateful))


def _walk(path: Path, value: Any, container: Any, index: Any, per_rank: bool = False) -> Iterator[Leaf]:
    if len(path) > MAX_PATH:
        raise ValueError(f"{key_of(path)[:100]}... contains itself, or is more than {MAX_PATH} names deep")
    if isinstance(value, PerRank):
        yield from _walk(path, value.value, vars(value), "value", True)
    elif isinstance(value, Mapping) and not has_state(value) and _is_taken_apart(value, not path):
        outline = _outline(value, not path)
        if outline is not None:
            yield Leaf(path, outline, container, index, per_rank)
        for key, item in value.items():
            yield from _walk((*path, str(key)), item, value, key, per_rank)
    elif isinstance(value, list) and _has_parts(value):
        if type(value) is not list:
            yield Leaf(path, Outline(value), container, index, per_rank)
        for number, item in enumerate(value):
            yield from _walk((*path, number), item, value, number, per_rank)
    else:
        yield Leaf(path, value, container, index, per_rank)


def _walk_destinations(path: Path, value: Any, container: Any, index: Any, per_rank: bool) -> Iterator[Leaf]:
    if isinstance(value, PerRank):
        yield from _walk_destinations(path, value.value, vars(value), "value", True)
    elif has_state(value) or (path and not has_objects(value)):
        yield Leaf(path, value, container, index, per_rank)
    elif isinstance(value, Mapping):
        yield Leaf(path, Outline(()), container, index, per_rank)
        for key, item in value.items():
            yield from _walk_destinations((*path, str(key)), item, value, key, per_rank)
    else:
        for number, item in enumerate(value):
            yield from _walk_destinations((*path, number), item, value, number, per_rank)


def has_objects(value: Any) -> bool:
    """Returns whether there is an object with a state of its own, or a ``PerRank``, in nested dicts and lists."""
    if has_state(value) or isinstance(value, PerRank):
        return True
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return any(map(has_objects, items))


def _is_taken_apart(value: Mapping[Any, Any], is_root: bool) -> bool:
    if is_root:
        return True
    if not value:
        return False
    is_plain = type(value) is dict and all(type(key) is str for key in value)
    return is_plain or any(has_tensors(item) for item in value.values())


def _outline(value: Mapping[Any, Any], is_root: bool) -> Outline | None:
    if any(type(key) is not str for key in value) and (is_root or type(value) is dict):
        return Outline(tuple(value))
    if is_root or type(value) is dict:
        return None
    if isinstance(value, defaultdict) and type(value) is defaultdict:
        return Outline((defaultdict(value.default_factory), *value))
    return Outline((type(value)(), *value)) if type(value) in (OrderedDict, Counter) else Outline(value)


def _has_parts(value: list[Any]) -> bool:
    return any(
        isinstance(item, (Mapping, Tensor, PerRank)) or has_state(item) or (isinstance(item, list) and _has_parts(item))
        for item in value
    )


def has_tensors(value: Any) -> bool:
    """Returns whether there is a tensor, or what ``has_objects`` looks for, in nested dicts and lists."""
    if isinstance(value, Mapping) and not has_state(value):
        return any(has_tensors(item) for item in value.values())
    if isinstance(value, list):
        return any(has_tensors(item) for item in value)
    return isinstance(value, (Tensor, PerRank)) or has_state(value)
