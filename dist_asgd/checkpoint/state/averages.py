"""Finds the averages of parameters that a checkpoint has, by the keys and values of its entries.

An optimizer has the average of a parameter as ``<optimizer>.state.<parameter>.ax``. Further averages, of an optimizer
that keeps several, are ``ax_<name>``; the name of the first is in the text of ``param_groups.0.average``.

``ShardedAverages`` has it as ``<averages>.<name>.<parameter>``, and the names under ``<averages>.progress.kinds``. What
it does with a buffer, "average" or "copy", is ``<averages>.progress.treatment.<buffer>``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from dist_asgd.averages.options import COPY, PROGRESS, first_name
from dist_asgd.checkpoint.state.tree import TreeNode

NO_VALUES: Mapping[str, Any] = MappingProxyType({})


def average_keys(
    root: TreeNode, names: Iterable[str], average: str | None = None, values: Mapping[str, Any] = NO_VALUES
) -> list[str]:
    """Returns the keys of the average of one parameter, one for each optimizer or ``ShardedAverages`` that has it.

    Args:
        root: the tree of the checkpoint's entries. Optimizers and averages are looked for among its children.
        names: by which they may know the parameter: its name in its module, also with the module's path in front.
        average: the name of one of several averages; None for the first.
        values: of the checkpoint, by key; the options of an optimizer's groups tell the name of its first average.
    """
    found = []
    for child in root.children.values():
        of_model = _model_averages(child)
        if of_model:
            wanted = of_model[0] if average is None else average
            found += [child.at((wanted, name)) for name in dict.fromkeys(names)]
            continue
        entry = "ax" if average in (None, _first_name(child, values)) else f"ax_{average}"
        found += [child.at(("state", name, entry)) for name in dict.fromkeys(names)]
    return [node.key for node in found if node.key is not None]


def average_names(root: TreeNode, values: Mapping[str, Any] = NO_VALUES) -> list[str]:
    """Returns the names of all averages in the checkpoint, each once.

    Args:
        root: the tree of the checkpoint's entries. Optimizers and averages are looked for among its children.
        values: of the checkpoint, by key; the options of an optimizer's groups tell the name of its first average.
    """
    names: dict[str, None] = {}
    for child in root.children.values():
        names |= dict.fromkeys(_model_averages(child))
        for state in child.at(("state",)).children.values():
            first = [_first_name(child, values)] if state.at(("ax",)).key is not None else []
            others = [str(key).removeprefix("ax_") for key in state.children if str(key).startswith("ax_")]
            names |= dict.fromkeys([*first, *others])
    return list(names)


def keys_of_average(root: TreeNode, values: Mapping[str, Any], average: str | None) -> list[str]:
    """Returns the keys of all entries of an average, of every optimizer and ``ShardedAverages`` that has it.

    Args:
        root: the tree of the checkpoint's entries. Optimizers and averages are looked for among its children.
        values: of the checkpoint, by key; the options of an optimizer's groups tell the name of its first average.
        average: the name of one of several averages; None for the first.
    """
    keys: list[str] = []
    for child in root.children.values():
        of_model = _model_averages(child)
        if of_model:
            keys += child.at((of_model[0] if average is None else average,)).entry_keys()
            continue
        entry = "ax" if average in (None, _first_name(child, values)) else f"ax_{average}"
        keys += [key for state in child.at(("state",)).children.values() if (key := state.at((entry,)).key) is not None]
    return keys


def copied_keys(root: TreeNode, values: Mapping[str, Any]) -> set[str]:
    """Returns the keys of buffers that a ``ShardedAverages`` has not averaged but copied, under all its averages."""
    found = [
        child.at((average, name)).key
        for child in root.children.values()
        for average in _model_averages(child)
        for name, treated in child.at((PROGRESS, "treatment")).children.items()
        if values.get(str(treated.key)) == COPY
    ]
    return {key for key in found if key is not None}


def _model_averages(node: TreeNode) -> list[str]:
    """Returns the names of the averages of a ``ShardedAverages``, the first one's first; none for another node."""
    return [str(name) for name in node.at((PROGRESS, "kinds")).children]


def _first_name(optimizer: TreeNode, values: Mapping[str, Any]) -> str:
    return first_name(str(values.get(str(optimizer.at(("param_groups", 0, "average")).key), "")))
