"""Forms that stock users give the state of an optimizer, as the one that ``get_optimizer_state_dict`` gives it.

- by numbers, as ``optimizer.state_dict()`` has it: ``state.0.ax``, and lists of numbers in the groups;
- flat (``flatten_optimizer_state_dict=True``, for pipeline parallelism): single entries ``state.<name>.ax``, and the
  options of groups for each parameter, ``param_groups.<name>.lr``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dist_asgd.checkpoint.state.load_plan import LoadPlan
from dist_asgd.checkpoint.state.tree import Path, TreeNode, key_of

STATE, GROUPS = "state", "param_groups"


def by_names(plan: LoadPlan, path: Path, groups: Sequence[Mapping[str, Any]]) -> tuple[TreeNode, bool]:
    """What the checkpoint has of the optimizer at ``path``, by names of parameters.

    Args:
        groups: of the live optimizer, with the names of their parameters.

    Returns:
        The state, and whether its groups have lists of the names. Differences are noted as the plan's problems.
    """
    node = plan.root.at(path)
    names = [group["params"] for group in groups]
    if not plan.is_stock:
        return node, True
    if node.children.keys().isdisjoint((STATE, GROUPS)):
        return _flat(plan, path, node, names), False
    numbers = [_numbers(plan, node.at((GROUPS, index, "params"))) for index in range(len(names))]
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


def _numbers(plan: LoadPlan, node: TreeNode) -> list[int] | None:
    """The list of a group's parameters, if it is one of numbers. Then it is asked for."""
    found = plan.values.get(str(node.key))
    if not isinstance(found, list) or not found or not all(type(number) is int for number in found):
        return None
    plan.used.add(str(node.key))
    return found


def _flat(plan: LoadPlan, path: Path, node: TreeNode, names: Sequence[Sequence[str]]) -> TreeNode:
    found: dict[str, dict[str | int, TreeNode]] = {STATE: {}, GROUPS: {}}  # of each parameter
    for name, child in node.children.items():
        kind, _, rest = str(name).partition(".")
        parameter, _, last = rest.rpartition(".")
        if kind in found and parameter:
            found[kind].setdefault(parameter, TreeNode()).children[last] = child
    groups = TreeNode()
    for index, of_group in enumerate(names):
        options = [found[GROUPS].get(name, TreeNode()).children for name in of_group]
        groups.children[index] = TreeNode(children=dict(options[0]) if options else {})
        for name, others in zip(of_group, options, strict=True):
            _compare(plan, options[0], others, key_of((*path, GROUPS, name)))
    return TreeNode(children={STATE: TreeNode(children=found[STATE]), GROUPS: groups})


def _compare(
    plan: LoadPlan, first: Mapping[str | int, TreeNode], others: Mapping[str | int, TreeNode], where: str
) -> None:
    """The options of a parameter must be those of the first one in its group."""
    keys = [str(child.key) for child in others.values()]
    plan.used.update(keys)
    if not others:
        plan.lacks(where, "expected the options of the parameter's group")
    elif first is not others:
        for name, child in others.items():
            expected, found = (plan.values.get(str(node.key)) for node in (first.get(name, TreeNode()), child))
            if found != expected:
                text = f"found {found!r}, expected {expected!r}, which the first parameter of its group has"
                plan.problems.wrong_dtype[str(child.key)] = text
