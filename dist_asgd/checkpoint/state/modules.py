"""Modules: the names of their parameters, without those of wrappers, and their state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from dist_asgd.checkpoint.state.averages import average_keys, average_names
from dist_asgd.checkpoint.state.load_plan import MODULES, LoadPlan, plain_tensor
from dist_asgd.checkpoint.state.module_names import (
    fqn_of,
    is_fsdp1,
    parameter_names,
)
from dist_asgd.checkpoint.state.tree import Path, key_of


def module_state(module: nn.Module) -> dict[str, Any]:
    """Parameters, persistent buffers and extra state by name. Tensors share memory. Collective under FSDP1."""
    if is_fsdp1(module):
        return dict(get_model_state_dict(module))
    return {fqn_of(module, name): value for name, value in module.state_dict().items()}


def plan_module(plan: LoadPlan, path: Path, module: nn.Module, average: bool | str) -> None:
    """The module's tensors are read in place, then ``load_state_dict`` is called with them: hooks may want that."""
    state = module_state(module)
    averages = _averages(plan, path, module, None if average is True else average) if average else {}
    loaded: dict[str, Any] = {}
    for name, value in state.items():
        key = key_of((*path, name))
        if not isinstance(value, Tensor):
            node = plan.root.at((*path, name))
            if not list(node.entries()):
                plan.lacks(key, f"expected extra state, like {type(value).__name__}")
            elif (extra := plan.take(node, plain_tensor)) is not None:
                loaded[name] = extra
        elif name in averages:
            plan.used.add(key)
            if (taken := _fill_average(plan, averages[name], value)) is not None:
                loaded[name] = lambda taken=taken: taken
        elif plan.fits(key, value):
            plan.fill(key, value)
            loaded[name] = lambda value=value: value
    plan.used.add(key_of(path))  # where there is no state at all
    plan.finish_with(MODULES, lambda: _load(module, {name: value() for name, value in loaded.items()}))


def _load(module: nn.Module, state: dict[str, Any]) -> None:
    if is_fsdp1(module):
        set_model_state_dict(module, state, options=StateDictOptions(strict=False))
        return
    wrapped = {fqn_of(module, name): name for name in module.state_dict()}
    module.load_state_dict({wrapped[name]: value for name, value in state.items()}, strict=False)


def _fill_average(plan: LoadPlan, key: str, param: Tensor) -> Tensor | None:
    """The tensor that the average is read into: the parameter itself, or one of the average's dtype."""
    if not plan.fits(key, param, any_dtype=True):
        return None
    dtype = plan.tensors[key].dtype
    tensor = param if dtype == param.dtype else torch.empty_like(param, dtype=dtype)
    plan.fill(key, tensor)
    return tensor


def _averages(plan: LoadPlan, path: Path, module: nn.Module, average: str | None) -> dict[str, str]:
    """The key of the average of each parameter that has one, by the parameter's name.

    Raises ``ValueError`` where several optimizers have one, or none of the checkpoint has any, or one of that name.
    """
    known = average_names(plan.root, plan.values)
    if not known:
        raise ValueError("the checkpoint has no averages: there is no optimizer in it that has 'ax' of a parameter")
    if average is not None and average not in known:
        raise ValueError(f"the checkpoint has no average {average!r}, it has {known}")
    by_param: dict[int, list[str]] = {}
    for name, param in parameter_names(module).items():
        by_param.setdefault(id(param), []).append(name)
    found: dict[str, str] = {}
    for names in by_param.values():
        keys = {key for name in names for key in average_keys(plan.root, path, name, average, plan.values)}
        if len(keys) > 1:
            raise ValueError(f"several optimizers of the checkpoint have an average of {names[0]}: {sorted(keys)}")
        found |= {name: key for name in names for key in keys}
    return found
