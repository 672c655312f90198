"""XXX docstring."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from dist_asgd._torch_private import WRAPPER_NAMES, submodules
from dist_asgd.checkpoint.state.tree import Path


def fqn_of(module: nn.Module, name: str) -> str:
    """A name in ``module``'s state dict without the wrappers, as ``torch.distributed.checkpoint.state_dict`` has it."""
    kept: list[str] = []
    current: nn.Module | None = module
    for part in name.split("."):
        if part not in WRAPPER_NAMES and not (part == "module" and isinstance(current, DistributedDataParallel)):
            kept.append(part)
        current = submodules(current).get(part) if current is not None else None
    return ".".join(kept)


def unwrapped(module: nn.Module) -> nn.Module:
    """What the wrappers around ``module`` itself are wrapped around."""
    names = {"module"} if isinstance(module, DistributedDataParallel) else submodules(module).keys() & WRAPPER_NAMES
    inner = submodules(module)[names.pop()] if names else None
    return module if inner is None else unwrapped(inner)


def without_wrappers(name: str) -> str:
    """A name that may have those of wrappers in it, where the module is not there to tell."""
    return ".".join(part for part in name.split(".") if part not in WRAPPER_NAMES)


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


def names_in(modules: Mapping[Path, nn.Module]) -> dict[int, tuple[Path, str]]:
    """For each parameter, by identity, the path of the module that has it and its name there: the first of both."""
    names: dict[int, tuple[Path, str]] = {}
    for path, module in modules.items():
        for name, param in parameter_names(module).items():
            names.setdefault(id(param), (path, name))
    return names
