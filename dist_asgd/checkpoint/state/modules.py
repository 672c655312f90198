"""The state of modules: what is saved of a module, and how a load fills it, with parameters or with averages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from dist_asgd.checkpoint.state.averages import average_keys, average_names
from dist_asgd.checkpoint.state.load_plan import MODULES, LoadPlan, known_or_new
from dist_asgd.checkpoint.state.masters import plan_parameter
from dist_asgd.checkpoint.state.module_names import fqn_of, is_fsdp1, parameter_names
from dist_asgd.checkpoint.state.tree import Path, key_of, leaves

EXTRA_STATE = "_extra_state"  # last part of the name under which ``state_dict()`` has what get_extra_state() returned


def module_state(module: nn.Module) -> dict[str, Any]:
    """Returns the module's parameters, persistent buffers and extra state, by their names without wrappers.

    Tensors share memory with the module. Collective if a part of the module is wrapped in FSDP1.
    """
    if is_fsdp1(module):
        return dict(get_model_state_dict(module))
    return {fqn_of(module, name): value for name, value in module.state_dict().items()}


def plan_module(plan: LoadPlan, path: Path, module: nn.Module, average: bool | str) -> None:
    """Plans to load the module at ``path``. Collective if a part of the module is wrapped in FSDP1.

    Tensors are read into the module's own memory. ``load_state_dict`` is then called with them all the same, since
    hooks of the module may want that.

    Args:
        average: True to read averages into parameters that have one, the first where there are several; or the name
            of an average; False for none. An average of a wider dtype is rounded once.

    Raises:
        ValueError: where averages are asked for and the checkpoint has none, or several of one parameter.
        CheckpointError: where two entries become one without the names of wrappers.
    """
    state = module_state(module)
    plan.saved_names[path] = plan.rename(plan.root.at(path), state.keys())
    averages = _averages(plan, path, module, state, None if average is True else average) if average else {}
    loaded: dict[str, Any] = {}
    for name, value in state.items():
        key = plan.root.at((*path, name)).key or key_of((*path, name))
        if not isinstance(value, Tensor) or name.rpartition(".")[2] == EXTRA_STATE:
            node = plan.root.at((*path, name))
            live = {key_of(leaf.path): leaf.value for leaf in leaves(value, (*path, name))}
            if not list(node.entry_keys()):
                plan.note_missing(key, f"expected extra state, like {type(value).__name__}")
            elif (extra := plan.read_subtree(node, known_or_new(plan, live))) is not None:
                loaded[name] = extra
        elif name in averages:
            plan.used.add(key)
            if plan.fits(averages[name], value, any_dtype=True):
                plan.fill(averages[name], value)
                loaded[name] = lambda value=value: value
        elif plan.fits(key, value):
            plan_parameter(plan, path, name, key, value)
            loaded[name] = lambda value=value: value
    plan.used.add(key_of(path))  # a module without any state is saved as a single entry, an empty dict
    plan.after_read(MODULES, lambda: _load_state_dict(module, {name: value() for name, value in loaded.items()}))


def _load_state_dict(module: nn.Module, state: dict[str, Any]) -> None:
    if is_fsdp1(module):
        set_model_state_dict(module, state, options=StateDictOptions(strict=False))
        return
    wrapped = {fqn_of(module, name): name for name in module.state_dict()}
    module.load_state_dict({wrapped[name]: value for name, value in state.items()}, strict=False)


def _averages(
    plan: LoadPlan, path: Path, module: nn.Module, state: Mapping[str, Any], average: str | None
) -> dict[str, str]:
    """Returns the key of the average of each parameter and buffer that has one, by its name in ``state``.

    Raises:
        ValueError: where the checkpoint has no averages, or none named ``average``, or where several optimizers have
            one of a parameter.
    """
    known = average_names(plan.root, plan.values)
    if not known:
        raise ValueError(
            "the checkpoint has no averages: neither ShardedAverages nor an optimizer that has 'ax' of a parameter"
        )
    if average is not None and average not in known:
        raise ValueError(f"the checkpoint has no average {average!r}, it has {known}")
    by_param: dict[int, list[str]] = {}
    for name, param in parameter_names(module).items():
        by_param.setdefault(id(param), []).append(name)
    found: dict[str, str] = {}
    for names in by_param.values():
        own = {name: set(average_keys(plan.root, plan.names_of(path, name), average, plan.values)) for name in names}
        keys = set().union(*own.values())
        # ShardedAverages has a tied weight under each of its names; an optimizer has it under one of them.
        if len(keys) > 1 and any(len(of_name) != 1 for of_name in own.values()):
            raise ValueError(f"several optimizers of the checkpoint have an average of {names[0]}: {sorted(keys)}")
        found |= {name: min(of_name or keys) for name, of_name in own.items() if keys}
    for name in state.keys() - found.keys():  # buffers, which ShardedAverages may have
        if keys := set(average_keys(plan.root, plan.names_of(path, name), average, plan.values)):
            found[name] = min(keys)
    return found
