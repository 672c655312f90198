"""Where the state of optimizers is read to: also that of an optimizer that has none yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dist_asgd.averages.options import TORCHS, average_of, same_averages
from dist_asgd.checkpoint.format.entries import SavedTensor
from dist_asgd.checkpoint.state.load_plan import OPTIMIZERS, LoadPlan, missing
from dist_asgd.checkpoint.state.optimizer_forms import by_names
from dist_asgd.checkpoint.state.optimizer_names import NamedOptimizer
from dist_asgd.checkpoint.state.tensor_blocks import is_sharded, new_like, share_memory
from dist_asgd.checkpoint.state.tree import Path, TreeNode, key_of, leaves

# Which averages there are. They must be as they were, since an average cannot go on as one of another kind.
AVERAGE = "average"

# Options that choose an implementation, and what is not an option: these stay as they are, whatever was saved.
KEPT = {"params", "param_names", AVERAGE, "foreach", "fused", "capturable", "differentiable"}

# Options of ASGD that torch's does not have, nor a group that does as torch does. If not saved, they stay as they are.
OPTIONAL = {"lr_on_time", "eta_decay"}

Taken = Callable[[], Any]  # what was read, once it was


def plan_optimizer(plan: LoadPlan, path: Path, target: NamedOptimizer) -> None:
    """All state that the checkpoint has of the optimizer's parameters is read; others will have none."""
    if not list(plan.root.at(path).entries()):
        missing(plan, path, type(target.optimizer).__name__)
        return
    live, params = target.state_dict(), target.params()
    node, has_names = by_names(plan, path, live["param_groups"])
    saved_state = node.at(("state",))
    plan.used.update([] if saved_state.key is None else [saved_state.key])  # an empty one
    state: dict[str, Taken] = {}
    for name in [name for group in live["param_groups"] for name in group["params"]]:
        child = saved_state.at((name,))
        if list(child.entries()):
            destinations = _Destinations(plan, child, live["state"].get(name, {}), params[name])
            taken = plan.take(child, destinations.tensor_for)
            if taken is not None:
                state[name] = taken
    defaults = target.optimizer.defaults
    groups = []
    for number, group in enumerate(live["param_groups"]):
        where = (*path, "param_groups", number)
        groups.append(_plan_group(plan, where, node.at(("param_groups", number)), group, defaults))
        if has_names:
            _compare_names(plan, where, group["params"])

    def finish() -> None:
        loaded = {name: entry() for name, entry in state.items()}
        target.load({"state": loaded, "param_groups": [group() for group in groups]})

    plan.finish_with(OPTIMIZERS, finish)


class _Destinations:
    """Tensors for the entries of the state of one parameter."""

    def __init__(self, plan: LoadPlan, node: TreeNode, live: Any, param: Tensor) -> None:
        self._plan, self._param = plan, param
        known = {key_of(leaf.path): leaf.value for leaf in leaves(live)}
        self._live = {key: known.get(key_of(place)) for key, place in node.places()}

    def tensor_for(self, key: str, saved: SavedTensor) -> Tensor | None:
        """The live tensor; a new one where there is none, or where writing to it would change the parameter."""
        live, param = self._live.get(key), self._param
        if isinstance(live, Tensor):
            if not self._plan.fits(key, live, any_dtype=not live.ndim):  # a step may be wider
                return None
            return live if live.dtype == saved.dtype and not share_memory(live, param) else new_like(live, saved.dtype)
        if saved.shape and saved.shape == tuple(param.shape):
            return new_like(param, saved.dtype)
        device = param.device if saved.shape and not is_sharded(param) else "cpu"
        return torch.empty(saved.shape, dtype=saved.dtype, device=device)


def _plan_group(
    plan: LoadPlan, where: Path, node: TreeNode, live: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Callable[[], dict[str, Any]]:
    """The group as it is to be: the saved options, and the live ones that were not saved.

    Missing is an option of the optimizer that was not saved, unless it is None or False by default: a newer torch may
    have added that.
    """
    options: dict[str, Taken] = {}
    for name, child in node.children.items():
        taken = plan.take(child, _beside(live.get(str(name))))
        if taken is not None and name not in KEPT:
            options[str(name)] = taken
    for name, value in defaults.items():
        needed = name not in KEPT | OPTIONAL and value is not None and value is not False
        if needed and name not in node.children:
            plan.lacks(key_of((*where, name)), f"expected a value like {value!r}")
    _compare_averages(plan, where, live)
    return lambda: {**live, **{name: option() for name, option in options.items()}}


def _compare_averages(plan: LoadPlan, where: Path, live: Mapping[str, Any]) -> None:
    key, expected = key_of((*where, AVERAGE)), average_of(live)
    if key not in plan.values:
        if not same_averages(expected, TORCHS):
            plan.lacks(key, f"expected {expected}")
    elif not same_averages(str(saved := plan.values[key]), expected):
        plan.problems.wrong_dtype[key] = f"found {saved}, expected {expected}"


def _beside(live: Any) -> Callable[[str, SavedTensor], Tensor]:
    """New tensors where the option is now: a learning rate may be a tensor."""
    device = live.device if isinstance(live, Tensor) else "cpu"
    return lambda key, saved: torch.empty(saved.shape, dtype=saved.dtype, device=device)


def _compare_names(plan: LoadPlan, where: Path, names: list[str]) -> None:
    """The parameters of a group must be those of the saved one, in any order."""
    key = key_of((*where, "params"))
    if key not in plan.values:
        plan.lacks(key, f"expected a group of {len(names)} parameters")
        return
    saved = plan.values[key]
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        plan.problems.wrong_dtype[key] = "expected a list of names"
        return
    for name in set(names) - set(saved):
        plan.lacks(f"{key}: {name}", "the parameter was not in this group")
    for name in (set(saved) - set(names)) if plan.strict else ():
        plan.problems.unexpected[f"{key}: {name}"] = "the parameter is not in this group now"
