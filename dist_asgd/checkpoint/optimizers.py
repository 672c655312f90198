"""Optimizers: their state by the names of parameters, whatever ids they have for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from dist_asgd.checkpoint.blocks import is_sharded, to_fill
from dist_asgd.checkpoint.entries import SavedTensor
from dist_asgd.checkpoint.modules import is_fsdp1, names_in
from dist_asgd.checkpoint.nesting import Path, key_of, leaves
from dist_asgd.checkpoint.plan import OPTIMIZERS, Plan, missing
from dist_asgd.checkpoint.values import decode


@dataclass(frozen=True, slots=True)
class Named:
    """An optimizer, and the names of its parameters."""

    optimizer: torch.optim.Optimizer
    names: list[list[str]]  # by group
    module: nn.Module | None  # that FSDP1 has wrapped

    def params(self) -> dict[str, Tensor]:
        return {
            name: param
            for names, group in zip(self.names, self.optimizer.param_groups, strict=True)
            for name, param in zip(names, group["params"], strict=True)
        }

    def ids(self, state_dict: Mapping[str, Any]) -> dict[Any, str]:
        """The name for each id of a parameter in the optimizer's state dict."""
        groups = zip(self.names, state_dict["param_groups"], strict=True)
        return {key: name for names, group in groups for name, key in zip(names, group["params"], strict=True)}


def named(path: Path, optimizer: torch.optim.Optimizer, modules: Mapping[Path, nn.Module]) -> Named:
    """Raises ``ValueError`` where a parameter has no name, or several have the same."""
    known = names_in(modules)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    owners = {known[id(param)][0] for param in params if id(param) in known}
    names: list[list[str]] = []
    for number, group in enumerate(optimizer.param_groups):
        given = group.get("param_names")
        names.append([])
        for index, param in enumerate(group["params"]):
            if id(param) in known:
                owner, name = known[id(param)]
                names[-1].append(name if len(owners) == 1 else key_of((*owner, name)))
            elif given is not None:
                names[-1].append(_unwrapped(given[index]))
            else:
                raise ValueError(
                    f"parameter {index} (shape {list(param.shape)}) of group {number} of {key_of(path)} has no name, "
                    "under which its state could be found: put the module into the state as well, or build the "
                    "optimizer from model.named_parameters()"
                )
    flat = [name for of_group in names for name in of_group]
    twice = sorted({name for name in flat if flat.count(name) > 1}) if len(set(flat)) < len(flat) else []
    if twice:
        raise ValueError(f"several parameters of {key_of(path)} are named {twice[0]!r}: they need names of their own")
    wrapped = [modules[owner] for owner in owners if is_fsdp1(modules[owner])]
    return Named(optimizer, names, wrapped[0] if wrapped else None)


def optimizer_state(named_optimizer: Named) -> dict[str, Any]:
    """As ``get_optimizer_state_dict`` has it, which must not be asked: it takes a fake step where there is no state.

    Collective under FSDP1.
    """
    optimizer = named_optimizer.optimizer
    if named_optimizer.module is not None and optimizer.state:
        return dict(get_optimizer_state_dict(named_optimizer.module, optimizer))
    state_dict = optimizer.state_dict()
    ids = named_optimizer.ids(state_dict)
    return {
        "state": {ids.get(key, key): entry for key, entry in state_dict["state"].items()},
        "param_groups": [
            {**group, "params": names}
            for group, names in zip(state_dict["param_groups"], named_optimizer.names, strict=True)
        ],
    }


def plan_optimizer(plan: Plan, path: Path, target: Named) -> None:
    """What the checkpoint has of the state is read, whether the optimizer has a state yet or not."""
    node = plan.root.at(path)
    if not list(node.entries()):
        missing(plan, path, type(target.optimizer).__name__)
        return
    live = target.optimizer.state_dict()
    ids = {name: key for key, name in target.ids(live).items()}
    tensor_for = _Destinations(plan, path, target, live["state"], ids)
    state: dict[Any, Callable[[], Any]] = {}
    saved_state = node.at(("state",))
    plan.used.update([] if saved_state.key is None else [saved_state.key])  # an empty one
    for name in ids:
        child = saved_state.at((name,))
        if list(child.entries()) and (taken := plan.take(child, tensor_for.of(name))) is not None:
            state[ids[name]] = taken
    groups = [_plan_group(plan, path, target, number, group) for number, group in enumerate(live["param_groups"])]

    def finish() -> None:
        loaded = {key: entry() for key, entry in state.items()}
        target.optimizer.load_state_dict({"state": loaded, "param_groups": [group() for group in groups]})
        _undo_casts(target, {name: loaded[key] for name, key in ids.items() if key in loaded})

    plan.finish_with(OPTIMIZERS, finish)


@dataclass(frozen=True, slots=True)
class _Destinations:
    """Tensors for the entries of an optimizer's state."""

    plan: Plan
    path: Path
    target: Named
    live: Mapping[Any, Any]  # state by id
    ids: Mapping[str, Any]

    def of(self, name: str) -> Callable[[str, SavedTensor], Tensor | None]:
        param = self.target.params()[name]
        prefix = (*self.path, "state", name)
        known = {key_of(leaf.path): leaf.value for leaf in leaves(self.live.get(self.ids[name], {}), prefix)}

        def tensor_for(key: str, saved: SavedTensor) -> Tensor | None:
            return self._tensor(key, saved, known.get(key), param)

        return tensor_for

    def _tensor(self, key: str, saved: SavedTensor, known: Any, param: Tensor) -> Tensor | None:
        if isinstance(known, Tensor):
            if not self.plan.fits(key, known, any_dtype=not known.ndim):
                return None
            return known if known.dtype == saved.dtype and not _shares_memory(known, param) else _like(known, saved)
        if saved.shape == tuple(param.shape) and saved.shape:
            return _like(param, saved)
        device = "cpu" if not saved.shape else param.device
        return torch.empty(saved.shape, dtype=saved.dtype, device=device)


def _like(tensor: Tensor, saved: SavedTensor) -> Tensor:
    if not tensor.ndim and not is_sharded(tensor):
        return torch.empty((), dtype=saved.dtype, device=tensor.device)
    if not tensor.ndim:
        return torch.empty((), dtype=saved.dtype, device="cpu")
    return torch.empty_like(tensor.detach(), dtype=saved.dtype)


def _shares_memory(tensor: Tensor, param: Tensor) -> bool:
    """Whether what is written to ``tensor`` would change the parameter."""
    ours = {block.data.untyped_storage().data_ptr() for block in to_fill("", tensor).blocks if block.box.numel}
    theirs = {block.data.untyped_storage().data_ptr() for block in to_fill("", param).blocks if block.box.numel}
    return bool(ours & theirs)


def _plan_group(
    plan: Plan, path: Path, target: Named, number: int, live: Mapping[str, Any]
) -> Callable[[], dict[str, Any]]:
    """The group as it is to be: the saved options, and the live ones that were not saved."""
    where = (*path, "param_groups", number)
    node = plan.root.at(where)
    options: dict[str, Callable[[], Any]] = {}
    for name, child in node.children.items():
        if (taken := plan.take(child, _beside(live.get(str(name))))) is not None:
            options[str(name)] = taken
    for name in _needed(target.optimizer, node.children):
        plan.lacks(key_of((*where, name)), f"{type(target.optimizer).__name__} has it")
    _compare_names(plan, where, target.names[number])
    kept = {"params", "param_names"}
    return lambda: {**live, **{name: option() for name, option in options.items() if name not in kept}}


def _beside(known: Any) -> Callable[[str, SavedTensor], Tensor]:
    """New tensors where the option is now: a learning rate may be a tensor."""
    device = known.device if isinstance(known, Tensor) else "cpu"
    return lambda key, saved: torch.empty(saved.shape, dtype=saved.dtype, device=device)


def _needed(optimizer: torch.optim.Optimizer, saved: Mapping[Any, Any]) -> list[str]:
    """Options that were not saved. Those that are None or False may be of a newer torch than the checkpoint."""
    return [name for name, value in optimizer.defaults.items() if name not in saved and value not in (None, False)]


def _compare_names(plan: Plan, where: Path, names: list[str]) -> None:
    """The parameters of a group must be those of the saved one, in any order."""
    key = key_of((*where, "params"))
    if key not in plan.values:
        plan.lacks(key, f"expected a group of {len(names)} parameters")
        return
    saved = decode(plan.values[key], key)
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        plan.problems.wrong_dtype[key] = "expected a list of names"
        return
    for name in set(names) - set(saved):
        plan.lacks(f"{key}: {name}", "the parameter was not in this group")
    for name in (set(saved) - set(names)) if plan.strict else ():
        plan.problems.unexpected[f"{key}: {name}"] = "the parameter is not in this group now"


def _undo_casts(target: Named, loaded: Mapping[str, Mapping[str, Any]]) -> None:
    """torch gives all state but ``step`` the parameter's dtype, also where the optimizer keeps another (eta, mu)."""
    optimizer = target.optimizer
    if type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict:
        return
    params = target.params()
    for name, entry in loaded.items():
        state = optimizer.state[params[name]]
        for key, value in entry.items():
            if isinstance(value, Tensor) and state[key].dtype != value.dtype:
                state[key] = value.to(state[key].device)


def _unwrapped(name: str) -> str:
    """A name that was given to the optimizer, without what wrappers put into it."""
    parts = [part for part in name.split(".") if part not in ("_orig_mod", "_fsdp_wrapped_module")]
    return ".".join(parts).replace("_checkpoint_wrapped_module.", "").removeprefix("module.")
