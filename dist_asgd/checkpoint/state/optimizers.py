"""Plans the load of an optimizer, whether it has state already or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_asgd.averages.options import TORCHS, average_of, same_averages
from dist_asgd.checkpoint.format.entries import SavedTensor
from dist_asgd.checkpoint.state.load_plan import OPTIMIZERS, DeferredValue, LoadPlan, is_castable
from dist_asgd.checkpoint.state.masters import MASTER, fill_master, saved_parameters
from dist_asgd.checkpoint.state.optimizer_forms import by_names
from dist_asgd.checkpoint.state.optimizer_names import NamedOptimizer
from dist_asgd.checkpoint.state.saved_names import renamed
from dist_asgd.checkpoint.state.tensor_blocks import is_sharded, new_like, share_memory
from dist_asgd.checkpoint.state.tree import Path, TreeNode, key_of, leaves

# The option that names the kinds of average. It must be as saved: an average cannot go on as one of another kind.
AVERAGE = "average"

# Entries of a group that a load leaves as they are: options that choose an implementation, and what is no option.
OPTIONS_NOT_LOADED = {"params", "param_names", AVERAGE, "foreach", "fused", "capturable", "differentiable"}

# Options of ShardedASGD that may be missing from a checkpoint and then stay as they are: torch.optim.ASGD does not have
# them, and groups that behave as in torch do not save them.
OPTIONS_MAY_BE_MISSING = {"lr_on_time", "eta_decay"}


def plan_optimizer(plan: LoadPlan, path: Path, target: NamedOptimizer, modules: Mapping[Path, nn.Module]) -> None:
    """Plans to load the optimizer at ``path``. Collective if it is one of FSDP1's parameters.

    After the load a parameter that the checkpoint has no state of has none, and options of groups are as saved. Each
    mismatch becomes a problem of the plan.

    Args:
        modules: live modules that are loaded as well, by path.
    """
    if not list(plan.root.at(path).entry_keys()):
        plan.note_missing(key_of(path), f"expected the state of {type(target.optimizer).__name__}")
        return
    live, params = target.state_dict(), target.params()
    node, has_names = by_names(plan, path, live["param_groups"])
    saved_state = node.at(("state",))
    plan.rename(saved_state, params)
    plan.used.update([] if saved_state.key is None else [saved_state.key])  # an entry of its own: an empty dict
    known = saved_parameters(plan, params, modules)
    state: dict[str, DeferredValue] = {}
    for name in [name for group in live["param_groups"] for name in group["params"]]:
        child, own = saved_state.at((name,)), live["state"].get(name, {})
        if list(child.entry_keys()):
            entry = _plan_state(plan, child, own, params[name], known.get(name), key_of((*path, "state", name)))
            if entry is not None:
                state[name] = entry
    defaults = target.optimizer.defaults
    groups = []
    for number, group in enumerate(live["param_groups"]):
        where = (*path, "param_groups", number)
        groups.append(_plan_group(plan, where, node.at(("param_groups", number)), group, defaults))
        if has_names:
            _compare_names(plan, where, group["params"])

    def load_state_dict() -> None:
        loaded = {name: entry() for name, entry in state.items()}
        target.load({"state": loaded, "param_groups": [group() for group in groups]})

    plan.after_read(OPTIMIZERS, load_state_dict)


def _plan_state(
    plan: LoadPlan, node: TreeNode, live: Mapping[str, Any], param: Tensor, param_key: str | None, where: str
) -> DeferredValue | None:
    """Plans to read the state of one parameter; returns what makes it, or None if it is not loaded.

    Args:
        node: of the state in the checkpoint.
        live: the state that ``param`` has now.
        param_key: of the parameter in the checkpoint; None if it is unknown.
        where: what errors call the state.
    """
    saved = None if param_key is None else plan.tensors[param_key]
    if saved is not None and saved.shape != tuple(param.shape):
        plan.used.update(node.entry_keys())
        plan.note_shape(where, f"its parameter was {list(saved.shape)}, and is {list(param.shape)} now")
        return None
    tensors = _StateTensors(plan, node, live, param, None if saved is None else saved.dtype)
    entry = plan.read_subtree(node, tensors.tensor_for)
    master = live.get(MASTER) if MASTER not in node.children else None
    if entry is not None and isinstance(master, Tensor):
        master = new_like(master, master.dtype)
        if fill_master(plan, param_key, master):
            return lambda: {**entry(), MASTER: master}
    return entry


class _StateTensors:
    """Chooses the tensors that the state of one parameter is read into."""

    def __init__(
        self, plan: LoadPlan, node: TreeNode, live: Any, param: Tensor, saved_dtype: torch.dtype | None
    ) -> None:
        self._plan, self._param = plan, param
        self._saved_dtype = saved_dtype  # of the parameter in the checkpoint; None if it is unknown
        known = {key_of(leaf.path): leaf.value for leaf in leaves(live)}
        self._live = {key: known.get(key_of(path)) for key, path in node.entry_paths()}

    def tensor_for(self, key: str, saved: SavedTensor) -> Tensor | None:
        """Returns the live tensor if it can be written to, and else a new one; None where the shape or dtype is wrong.

        A live tensor that shares memory with the parameter cannot be written to: reading would change the parameter.
        """
        live, param = self._live.get(key), self._param
        if isinstance(live, Tensor):
            if not self._plan.fits(key, live, any_dtype=not live.ndim):  # of scalars, such as step, any dtype is taken
                return None
            dtype = live.dtype if live.ndim else saved.dtype
            return live if live.dtype == dtype and not share_memory(live, param) else new_like(live, dtype)
        dtype = self._dtype(key, saved)
        if saved.shape and saved.shape == tuple(param.shape):
            return new_like(param, dtype)
        device = param.device if saved.shape and not is_sharded(param) else "cpu"
        return torch.empty(saved.shape, dtype=dtype, device=device)

    def _dtype(self, key: str, saved: SavedTensor) -> torch.dtype:
        """Returns the dtype of a new tensor: as saved, unless the load casts and the state follows the parameter.

        It does where it was saved in the parameter's dtype; if that is unknown, where the parameter's is wider.
        """
        wanted = self._param.dtype
        is_cast = self._plan.cast and bool(saved.shape) and saved.dtype != wanted and is_castable(saved.dtype, wanted)
        follows = (
            self._saved_dtype == saved.dtype
            if self._saved_dtype
            else torch.promote_types(saved.dtype, wanted) == wanted
        )
        if not (is_cast and follows):
            return saved.dtype
        self._plan.note_cast(key, saved, wanted)
        return wanted


def _plan_group(
    plan: LoadPlan, where: Path, node: TreeNode, live: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Callable[[], dict[str, Any]]:
    """Returns what makes the group after reading: the saved options, over the live ones.

    An option of the optimizer that was not saved is a problem, unless its default is None or False: such an option
    may come from a newer torch than the checkpoint.
    """
    options: dict[str, DeferredValue] = {}
    for name, child in node.children.items():
        option = plan.read_subtree(child, _empty_on_device_of(live.get(str(name))))
        if option is not None and name not in OPTIONS_NOT_LOADED:
            options[str(name)] = option
    for name, value in defaults.items():
        needed = name not in OPTIONS_NOT_LOADED | OPTIONS_MAY_BE_MISSING and value is not None and value is not False
        if needed and name not in node.children:
            plan.note_missing(key_of((*where, name)), f"expected a value like {value!r}")
    _compare_averages(plan, where, live)
    return lambda: {**live, **{name: option() for name, option in options.items()}}


def _compare_averages(plan: LoadPlan, where: Path, live: Mapping[str, Any]) -> None:
    key, expected = key_of((*where, AVERAGE)), average_of(live)
    if key not in plan.values:
        if not same_averages(expected, TORCHS):
            plan.note_missing(key, f"expected {expected}")
    elif not same_averages(str(saved := plan.values[key]), expected):
        plan.problems.wrong_dtype[key] = f"found {saved}, expected {expected}"


def _empty_on_device_of(live: Any) -> Callable[[str, SavedTensor], Tensor]:
    """Returns a ``tensor_for`` of ``LoadPlan.read_subtree`` for an option, which, as lr, may be a tensor on a GPU."""
    device = live.device if isinstance(live, Tensor) else "cpu"
    return lambda key, saved: torch.empty(saved.shape, dtype=saved.dtype, device=device)


def _compare_names(plan: LoadPlan, where: Path, names: list[str]) -> None:
    """Adds problems where the saved group has other parameters than ``names``, in whatever order."""
    key = key_of((*where, "params"))
    if key not in plan.values:
        plan.note_missing(key, f"expected a group of {len(names)} parameters")
        return
    saved = plan.values[key]
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        plan.problems.wrong_dtype[key] = "expected a list of names"
        return
    saved = renamed(saved, names, plan.prefix).values()
    for name in set(names) - set(saved):
        plan.note_missing(f"{key}: {name}", "the parameter was not in this group")
    for name in (set(saved) - set(names)) if plan.strict else ():
        plan.problems.unexpected[f"{key}: {name}"] = "the parameter is not in this group now"
