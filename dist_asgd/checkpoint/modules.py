"""Modules: the names of their parameters, without those of wrappers, and their state."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from dist_asgd.averages import first_name
from dist_asgd.checkpoint.nesting import Node, Path, key_of
from dist_asgd.checkpoint.plan import MODULES, Plan, plain_tensor

# What torch.compile, FSDP1 and activation checkpointing put into names; DistributedDataParallel's is a usual word.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

NO_VALUES: Mapping[str, Any] = MappingProxyType({})


def fqn_of(module: nn.Module, name: str) -> str:
    """A name in ``module``'s state dict without the wrappers, as ``torch.distributed.checkpoint.state_dict`` has it."""
    kept: list[str] = []
    current: nn.Module | None = module
    for part in name.split("."):
        if part not in WRAPPERS and not (part == "module" and isinstance(current, DistributedDataParallel)):
            kept.append(part)
        current = current._modules.get(part) if current is not None else None
    return ".".join(kept)


def unwrapped(module: nn.Module) -> nn.Module:
    """What the wrappers around ``module`` itself are wrapped around."""
    names = {"module"} if isinstance(module, DistributedDataParallel) else WRAPPERS & module._modules.keys()
    inner = module._modules[names.pop()] if names else None
    return module if inner is None else unwrapped(inner)


def without_wrappers(name: str) -> str:
    """A name that may have those of wrappers in it, where the module is not there to tell."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def parameter_names(module: nn.Module) -> dict[str, Tensor]:
    """Parameters by name; tied ones under each of theirs."""
    return {fqn_of(module, name): param for name, param in module.named_parameters(remove_duplicate=False)}


def tied_names(module: nn.Module) -> list[list[str]]:
    """For each parameter and buffer that has several names, all of them, in the order of the modules."""
    names: dict[int, list[str]] = {}
    for find in (module.named_parameters, module.named_buffers):
        for name, tensor in find(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(fqn_of(module, name))
    return [tied for tied in names.values() if len(tied) > 1]


def is_fsdp1(module: nn.Module) -> bool:
    return any(isinstance(child, FullyShardedDataParallel) for child in module.modules())


def module_state(module: nn.Module) -> dict[str, Any]:
    """Parameters, persistent buffers and extra state by name. Tensors share memory. Collective under FSDP1."""
    if is_fsdp1(module):
        return dict(get_model_state_dict(module))
    return {fqn_of(module, name): value for name, value in module.state_dict().items()}


def plan_module(plan: Plan, path: Path, module: nn.Module, average: bool | str) -> None:
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


def _fill_average(plan: Plan, key: str, param: Tensor) -> Tensor | None:
    """The tensor that the average is read into: the parameter itself, or one of the average's dtype."""
    if not plan.fits(key, param, any_dtype=True):
        return None
    dtype = plan.tensors[key].dtype
    tensor = param if dtype == param.dtype else torch.empty_like(param, dtype=dtype)
    plan.fill(key, tensor)
    return tensor


def _averages(plan: Plan, path: Path, module: nn.Module, average: str | None) -> dict[str, str]:
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


def average_keys(
    root: Node, path: Path, name: str, average: str | None = None, values: Mapping[str, Any] = NO_VALUES
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


def average_names(root: Node, values: Mapping[str, Any] = NO_VALUES) -> list[str]:
    """The names of the averages that optimizers below ``root`` have; ``values`` as for ``average_keys``."""
    names: dict[str, None] = {}
    for child in root.children.values():
        for state in child.at(("state",)).children.values():
            first = ["ax"] if state.at(("ax",)).key is not None else []
            others = [str(key) for key in state.children if str(key).startswith("ax_")]
            names |= dict.fromkeys([_first_name(child, values) for _ in first])
            names |= dict.fromkeys([key.removeprefix("ax_") for key in others])
    return list(names)


def _first_name(optimizer: Node, values: Mapping[str, Any]) -> str:
    return first_name(str(values.get(str(optimizer.at(("param_groups", 0, "average")).key), "")))


def names_in(modules: Mapping[Path, nn.Module]) -> dict[int, tuple[Path, str]]:
    """For each parameter, by identity, the path of the module that has it and its name there: the first of both."""
    names: dict[int, tuple[Path, str]] = {}
    for path, module in modules.items():
        for name, param in parameter_names(module).items():
            names.setdefault(id(param), (path, name))
    return names
