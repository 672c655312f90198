"""XXX docstring."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dist_asgd.averages.options import first_name
from dist_asgd.checkpoint.state.tree import Path, TreeNode, key_of

NO_VALUES: Mapping[str, Any] = MappingProxyType({})


def average_keys(
    root: TreeNode, path: Path, name: str, average: str | None = None, values: Mapping[str, Any] = NO_VALUES
) -> list[str]:
    """What optimizers below ``root`` have as averages of the parameter ``name`` of the module at ``path``.

    Args:
        average: the name of one of several; None for the first, which is ``ax`` whatever its name.
        values: of the checkpoint, by key. What they say of the groups of an optimizer tells the name of its first.
    """
    found = []
    for child in root.children.values():
        entry = "ax" if average in (None, _first_name(child, values)) else f"ax_{average}"
        found += [child.at(("state", known, entry)) for known in (name, key_of((*path, name)))]
    return [node.key for node in found if node.key is not None]


def average_names(root: TreeNode, values: Mapping[str, Any] = NO_VALUES) -> list[str]:
    """The names of the averages that optimizers below ``root`` have; ``values`` as for ``average_keys``."""
    names: dict[str, None] = {}
    for child in root.children.values():
        for state in child.at(("state",)).children.values():
            first = ["ax"] if state.at(("ax",)).key is not None else []
            others = [str(key) for key in state.children if str(key).startswith("ax_")]
            names |= dict.fromkeys([_first_name(child, values) for _ in first])
            names |= dict.fromkeys([key.removeprefix("ax_") for key in others])
    return list(names)


def _first_name(optimizer: TreeNode, values: Mapping[str, Any]) -> str:
    return first_name(str(values.get(str(optimizer.at(("param_groups", 0, "average")).key), "")))
