"""Optimizers whose state dicts are by the names of parameters, as ``get_optimizer_state_dict`` of torch makes them.

``Optimizer.state_dict()`` itself numbers the parameters, which fits no other number or order of parameters.
"""

from __future__ import annotations

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import FlatParameter, FullyShardedDataParallel, StateDictType

from dist_asgd._torch_private import is_fsdp1_slice, without_wrappers
from dist_asgd.checkpoint.state.module_names import is_fsdp1, parameter_owners
from dist_asgd.checkpoint.state.tree import Path, key_of


@dataclass(frozen=True, slots=True)
class NamedOptimizer(ABC):
    """An optimizer and the names of its parameters."""

    optimizer: torch.optim.Optimizer

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Returns the optimizer's state by names, of the form that ``get_optimizer_state_dict`` of torch has.

        An optimizer without state yet stays so; torch's function would take a fake step first (pytorch#164929).
        """

    @abstractmethod
    def params(self) -> dict[str, Tensor]:
        """Returns a tensor of the shape, layout and device of each parameter, by name."""

    @abstractmethod
    def load(self, state_dict: Mapping[str, Any]) -> None:
        """Loads a state dict of the form that ``state_dict()`` returns."""


@dataclass(frozen=True, slots=True)
class PlainOptimizer(NamedOptimizer):
    """An optimizer of parameters that have their full shape: plain tensors and DTensors. No method is collective."""

    names: list[list[str]]  # of the parameters of each group

    def state_dict(self) -> dict[str, Any]:
        state_dict = self.optimizer.state_dict()
        groups = zip(state_dict["param_groups"], self.names, strict=True)
        names_of = {key: name for group, names in groups for key, name in zip(group["params"], names, strict=True)}
        return {
            "state": {names_of.get(key, key): entry for key, entry in state_dict["state"].items()},
            "param_groups": [
                {**group, "params": names} for group, names in zip(state_dict["param_groups"], self.names, strict=True)
            ],
        }

    def params(self) -> dict[str, Tensor]:
        groups = zip(self.optimizer.param_groups, self.names, strict=True)
        return {name: param for group, names in groups for name, param in zip(names, group["params"], strict=True)}

    def load(self, state_dict: Mapping[str, Any]) -> None:
        ids = {name: number for number, name in enumerate(self.params())}
        state = {ids.get(name, name): entry for name, entry in state_dict["state"].items()}
        groups = [{**group, "params": [ids[name] for name in group["params"]]} for group in state_dict["param_groups"]]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self._undo_casts(state_dict["state"])

    def _undo_casts(self, loaded: Mapping[str, Mapping[str, Any]]) -> None:
        """Gives state its saved dtype again: torch casts all but ``step`` to the parameter's, even fp32 eta and mu."""
        if type(self.optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict:
            return
        params: dict[str, Any] = dict(self.params())
        for name, entry in loaded.items():
            state = self.optimizer.state.get(params.get(name, name), {})
            for key, value in entry.items() if isinstance(entry, Mapping) else ():
                now = state.get(key)
                if isinstance(value, Tensor) and isinstance(now, Tensor) and now.dtype != value.dtype:
                    state[key] = value.to(now.device)


@dataclass(frozen=True, slots=True)
class Fsdp1Optimizer(NamedOptimizer):
    """An optimizer of FSDP1's flat parameters or slices, which only FSDP1 can name. Every method is collective."""

    module: nn.Module

    def state_dict(self) -> dict[str, Any]:
        if self.optimizer.state:
            return dict(get_optimizer_state_dict(self.module, self.optimizer))
        with _sharded_state_dicts(self.module):
            state_dict = FullyShardedDataParallel.optim_state_dict(self.module, self.optimizer)
        for group in state_dict["param_groups"]:
            group["params"] = [without_wrappers(name) for name in group["params"]]
        return state_dict

    def params(self) -> dict[str, Tensor]:
        state = get_model_state_dict(self.module)
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}

    def load(self, state_dict: Mapping[str, Any]) -> None:
        with _sharded_state_dicts(self.module):
            flat = FullyShardedDataParallel.optim_state_dict_to_load(self.module, self.optimizer, dict(state_dict))
        self.optimizer.load_state_dict(flat)


def named_optimizer(path: Path, optimizer: torch.optim.Optimizer, modules: Mapping[Path, nn.Module]) -> NamedOptimizer:
    """Returns ``optimizer`` with names for its parameters.

    A parameter is named as its module names it; the module's path comes in front where the optimizer has parameters of
    several modules. A parameter of none of the modules has the name that the optimizer was given.

    Args:
        path: of the optimizer in the state that is saved or loaded; for errors.
        modules: all modules of that state, by path.

    Raises:
        ValueError: where a parameter has no name, or two have the same, or where FSDP1's module is not in the state.
    """
    known = parameter_owners(modules)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    owners = {known[id(param)][0] for param in params if id(param) in known}
    slices = [param for param in params if _is_fsdp1_slice(param)]
    for owner in owners:
        if slices and is_fsdp1(modules[owner]):
            return Fsdp1Optimizer(optimizer, modules[owner])
    if slices:
        raise ValueError(f"{key_of(path)} has slices of FSDP1's parameters: put the module into the state as well")
    names: list[list[str]] = []
    for number, group in enumerate(optimizer.param_groups):
        given = group.get("param_names")
        names.append([])
        for index, param in enumerate(group["params"]):
            if id(param) in known:
                owner, name = known[id(param)]
                names[-1].append(name if len(owners) == 1 else key_of((*owner, name)))
            elif given is not None:
                names[-1].append(without_wrappers(given[index]).removeprefix("module."))
            else:
                raise ValueError(_no_name_message(path, number, index, param))
    flat = [name for group_names in names for name in group_names]
    if len(set(flat)) < len(flat):
        twice = next(name for name in flat if flat.count(name) > 1)
        raise ValueError(f"several parameters of {key_of(path)} are named {twice!r}: they need names of their own")
    return PlainOptimizer(optimizer, names)


def _no_name_message(path: Path, number: int, index: int, param: Tensor) -> str:
    return (
        f"parameter {index} (shape {list(param.shape)}) of group {number} of {key_of(path)} has no name to save its "
        "state under: put the module into the state as well, or build the optimizer from model.named_parameters()"
    )


def _is_fsdp1_slice(param: Tensor) -> bool:
    """Returns whether ``param`` is a flat parameter of FSDP1, or a slice of one, which FSDP1 marks."""
    return isinstance(param, FlatParameter) or is_fsdp1_slice(param)


@contextlib.contextmanager
def _sharded_state_dicts(module: nn.Module) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP.state_dict_type", FutureWarning)
        with FullyShardedDataParallel.state_dict_type(module, StateDictType.SHARDED_STATE_DICT):
            yield
