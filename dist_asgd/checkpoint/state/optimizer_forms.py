"""Converts forms of optimizer state that stock DCP checkpoints have into the one of ``get_optimizer_state_dict``.

That one has ``state.<name>.ax``, and for each group its options and the names of its parameters. The others are:

- by number, from ``optimizer.state_dict()``: ``state.0.ax``, and lists of numbers in the groups;
- flattened, from ``flatten_optimizer_state_dict=True`` (for pipeline parallelism): single entries ``state.<name>.ax``
  whose name has the dots of all of it, and the options of groups for each parameter, ``param_groups.<name>.lr``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dist_asgd.checkpoint.state.load_plan import LoadPlan
from dist_asgd.checkpoint.state.tree import Path, TreeNode, key_of

STATE, GROUPS = "state", "param_groups"


def by_names(plan: LoadPlan, path: Path, groups: Sequence[Mapping[str, Any]]) -> tuple[TreeNode, bool]:
    """Returns the tree of the entries of the optimizer at ``path``, with parameters by name.

    Parameters that do not match the live ones become problems of the plan.

    Args:
        groups: the live optimizer's, each with the names of its parameters as ``params``.

    Returns:
        The tree, and whether its groups have ``params`` that are to be compared with the live names.
    """
    node = plan.root.at(path)
    names = [group["params"] for group in groups]
    if not plan.is_stock:
        return node, True
    if node.children.keys().isdisjoint((STATE, GROUPS)):
        return _from_flattened(plan, path, node, names), False
    numbers = [_parameter_numbers(plan, node.at((GROUPS, index, "params"))) for index in range(len(names))]
    if None in numbers:
        return node, True
    states = TreeNode()
    for index, (known, numbered) in enumerate(zip(names, numbers, strict=True)):
        if len(known) != len(numbered or ()):
            key = key_of((*path, GROUPS, index, "params"))
            plan.problems.wrong_dtype[key] = f"found {len(numbered or ())} parameters by number, expected {len(known)}"
            continue
        for name, number in zip(known, numbered or (), strict=True):
            states.children[name] = node.at((STATE, str(number)))
    return TreeNode(children={STATE: states, GROUPS: node.at((GROUPS,))}), False


def _parameter_numbers(plan: LoadPlan, node: TreeNode) -> list[int] | None:
    """Returns the saved parameters of a group, and marks the entry as used; None where they are not numbers."""
    found = plan.values.get(str(node.key))
    if not isinstance(found, list) or not found or not all(type(number) is int for number in found):
        return None
    plan.used.add(str(node.key))
    return found


def _from_flattened(plan: LoadPlan, path: Path, node: TreeNode, names: Sequence[Sequence[str]]) -> TreeNode:
    found: dict[str, dict[str | int, TreeNode]] = {STATE: {}, GROUPS: {}}  # by parameter
    for name, child in node.children.items():
        kind, _, rest = str(name).partition(".")
        parameter, _, last = rest.rpartition(".")
        if kind in found and parameter:
            found[kind].setdefault(parameter, TreeNode()).children[last] = child
    for kind in found:
        by_name = TreeNode(children=found[kind])
        plan.rename(by_name, [name for group_names in names for name in group_names])
        found[kind] = by_name.children
    groups = TreeNode()
    for index, group_names in enumerate(names):
        options = [found[GROUPS].get(name, TreeNode()).children for name in group_names]
        groups.children[index] = TreeNode(children=dict(options[0]) if options else {})
        for name, others in zip(group_names, options, strict=True):
            _compare_options(plan, options[0], others, key_of((*path, GROUPS, name)))
    return TreeNode(children={STATE: TreeNode(children=found[STATE]), GROUPS: groups})


def _compare_options(
    plan: LoadPlan, first: Mapping[str | int, TreeNode], others: Mapping[str | int, TreeNode], where: str
) -> None:
    """Adds problems where a parameter's options differ from those of the first parameter of its group."""
    keys = [str(child.key) for child in others.values()]
    plan.used.update(keys)
    if not others:
        plan.note_missing(where, "expected the options of the parameter's group")
    elif first is not others:
        for name, child in others.items():
            expected, found = (plan.values.get(str(node.key)) for node in (first.get(name, TreeNode()), child))
            if found != expected:
                text = f"found {found!r}, expected {expected!r}, which the first parameter of its group has"
                plan.problems.wrong_dtype[str(child.key)] = text
