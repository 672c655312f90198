"""Names of modules' parameters and buffers without the parts that wrappers add.

Wrappers are DistributedDataParallel, ``torch.compile``, FSDP1 and activation checkpointing. The names are those of
``torch.distributed.checkpoint.state_dict``.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from dist_asgd._torch_private import WRAPPER_NAMES, submodules
from dist_asgd.checkpoint.state.tree import Path


def fqn_of(module: nn.Module, name: str) -> str:
    """Returns ``name``, of an entry in the state dict of ``module``, without the parts that wrappers add."""
    kept: list[str] = []
    current: nn.Module | None = module
    for part in name.split("."):
        if part not in WRAPPER_NAMES and not (part == "module" and isinstance(current, DistributedDataParallel)):
            kept.append(part)
        current = submodules(current).get(part) if current is not None else None
    return ".".join(kept)


def unwrapped(module: nn.Module) -> nn.Module:
    """Returns the user's module inside all wrappers around ``module``. Wrappers of its submodules stay."""
    names = {"module"} if isinstance(module, DistributedDataParallel) else submodules(module).keys() & WRAPPER_NAMES
    inner = submodules(module)[names.pop()] if names else None
    return module if inner is None else unwrapped(inner)


def parameter_names(module: nn.Module) -> dict[str, Tensor]:
    """Returns the module's parameters by name. A tied parameter is there under each of its names."""
    return {fqn_of(module, name): param for name, param in module.named_parameters(remove_duplicate=False)}


def tied_names(module: nn.Module) -> list[list[str]]:
    """Returns all names of each parameter or buffer that has several, in the order of the modules."""
    names: dict[int, list[str]] = {}
    for find in (module.named_parameters, module.named_buffers):
        for name, tensor in find(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(fqn_of(module, name))
    return [tied for tied in names.values() if len(tied) > 1]


def is_fsdp1(module: nn.Module) -> bool:
    """Returns whether ``module`` or one of its submodules is wrapped in FSDP1."""
    return any(isinstance(child, FullyShardedDataParallel) for child in module.modules())


def parameter_owners(modules: Mapping[Path, nn.Module]) -> dict[int, tuple[Path, str]]:
    """Returns (path of the module, name in the module) of each parameter, by the parameter's ``id``.

    For a parameter that several modules have, or that has several names, these are the first ones.
    """
    owners: dict[int, tuple[Path, str]] = {}
    for path, module in modules.items():
        for name, param in parameter_names(module).items():
            owners.setdefault(id(param), (path, name))
    return owners
