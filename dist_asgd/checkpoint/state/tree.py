"""Nested state as entries, each with its path, and back."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Leaf:
    """What is not taken apart, and where it is."""

    path: Path
    value: Any
    container: Any  # the dict or list that has it
    place: Any  # its key or index there


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of a mapping that has parts and keys other than strings. Its entry tells them, in their order."""

    keys: tuple[Any, ...]


@dataclass(slots=True)
class TreeNode:
    """A place in nested state: of an entry, if it has a ``key``, and of what is below it."""

    key: str | None = None
    children: dict[str | int, TreeNode] = field(default_factory=dict)

    def at(self, path: Path) -> TreeNode:
        """The node below this one; one without anything where there is none."""
        node = self
        for name in path:
            node = node.children.get(name) or TreeNode()
        return node

    def entries(self) -> Iterator[str]:
        """Of all entries here and below."""
        return (key for key, _ in self.places())

    def places(self, path: Path = ()) -> Iterator[tuple[str, Path]]:
        """The same with their paths, if that of this node is ``path``."""
        if self.key is not None:
            yield self.key, path
        for name, child in self.children.items():
            yield from child.places((*path, name))


def leaves(state: Any, path: Path = ()) -> Iterator[Leaf]:
    """The leaves of nested state at ``path``, with the paths that ``torch.distributed.checkpoint`` gives them.

    Mappings are taken apart, and lists in which there are mappings, tensors or objects with a state. An empty mapping
    is a leaf. Beyond torch, which makes strings of all keys: a mapping with other keys, or of another type than dict
    that ``values`` knows, is a leaf if it has no tensors; if it has, its Keys are one.
    """
    return _below(path, state, None, None)


def key_of(path: Path) -> str:
    return ".".join(map(str, path))


def tree_of(paths: Mapping[str, Path]) -> TreeNode:
    """The nested state in which entries have these ``paths``, by key."""
    root = TreeNode()
    for key, path in paths.items():
        node = root
        for name in path:
            node = node.children.setdefault(name, TreeNode())
        node.key = key
    return root


def nested(node: TreeNode, entries: Mapping[str, Any]) -> Any:
    """What was taken apart into the entries, by key, at ``node`` and below."""
    if not node.children:
        return entries[str(node.key)]
    values = {name: nested(child, entries) for name, child in node.children.items()}
    if all(isinstance(name, int) for name in values):
        return [value for _, value in sorted(values.items(), key=lambda item: int(item[0]))]
    if node.key is None:
        return values
    return {key: values[str(key)] for key in entries[node.key] if str(key) in values}


def restored(value: Any, live: Any) -> Any:
    """``value`` with the keys and the types of mappings that ``live`` has in the same places.

    DCP makes dicts of all mappings, and strings of all keys.
    """
    if isinstance(value, dict) and isinstance(live, Mapping):
        known = {str(key): key for key in live}
        are_numbers = bool(live) and all(type(key) is int for key in live)
        items: dict[Any, Any] = {}
        for name, item in value.items():
            key = known.get(name, int(name) if are_numbers and name.isdecimal() else name)
            items[key] = restored(item, live.get(key))
        kind: Any = type(live) if type(live) in (OrderedDict, Counter) else dict
        return kind(items)
    if isinstance(value, list) and isinstance(live, list):
        return [restored(item, live[index] if index < len(live) else None) for index, item in enumerate(value)]
    return value


def has_state(value: Any) -> bool:
    """Whether it is a module, an optimizer, a scheduler or anything else with a state of its own."""
    return isinstance(value, (nn.Module, Stateful))


def _below(path: Path, value: Any, container: Any, place: Any) -> Iterator[Leaf]:
    if isinstance(value, Mapping) and not has_state(value) and _is_taken_apart(value, not path):
        if any(type(key) is not str for key in value):
            yield Leaf(path, Keys(tuple(value)), container, place)
        for key, item in value.items():
            yield from _below((*path, str(key)), item, value, key)
    elif isinstance(value, list) and _has_parts(value):
        for index, item in enumerate(value):
            yield from _below((*path, index), item, value, index)
    else:
        yield Leaf(path, value, container, place)


def _is_taken_apart(value: Mapping[Any, Any], is_root: bool) -> bool:
    if is_root:
        return True
    if not value:
        return False
    plain = type(value) not in (OrderedDict, Counter) and all(type(key) is str for key in value)
    return plain or any(_has_tensors(item) for item in value.values())


def _has_parts(value: list[Any]) -> bool:
    return any(
        isinstance(item, (Mapping, Tensor)) or has_state(item) or (isinstance(item, list) and _has_parts(item))
        for item in value
    )


def _has_tensors(value: Any) -> bool:
    if isinstance(value, Mapping) and not has_state(value):
        return any(_has_tensors(item) for item in value.values())
    if isinstance(value, list):
        return any(_has_tensors(item) for item in value)
    return isinstance(value, Tensor) or has_state(value)
