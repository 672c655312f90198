"""Reads the parameters that ``ShardedAverages`` is given, and their names in the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_asgd._torch_private import without_wrappers

DDP_PREFIX = "module."


def named_parameters(params: Iterable[Any], module: nn.Module | None) -> dict[Tensor, str]:
    """Returns the parameters with their names in the model, each once.

    Names lack the parts that wrappers (``torch.compile``, FSDP1, DistributedDataParallel) add.

    Args:
        params: tensors, (name, tensor) pairs, or param groups of either, as ``torch.optim`` takes them.
        module: the model, which has names for tensors that come without one; None if it is not known.

    Raises:
        TypeError: ``params`` has something that is no tensor, pair or param group.
        ValueError: ``params`` is empty, a parameter has no name, or two have one name.
    """
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of tensors, such as model.named_parameters(), got a Tensor")
    pairs = [pair for item in params for pair in _pairs(item)]
    if not pairs:
        raise ValueError("there is no parameter to average: params is empty")
    known = {} if module is None else {id(param): name for name, param in module.named_parameters()}
    named: dict[Tensor, str] = {}
    for name, param in pairs:
        found = known.get(id(param)) if name is None else name
        if found is None:
            raise ValueError(
                f"parameter {len(named)}, of shape {tuple(param.shape)}, has no name, by which its average is saved: "
                "pass model.named_parameters(), or module="
            )
        named.setdefault(param, found)
    return dict(zip(named, unwrapped_names(list(named.values()), module), strict=True))


def aliases(named: Mapping[Tensor, str], module: nn.Module | None) -> dict[str, list[str]]:
    """Returns all names that the model has for each parameter, by its first name: several where weights are tied."""
    found = {name: [name] for name in named.values()}
    everything = [] if module is None else list(module.named_parameters(remove_duplicate=False))
    for name, (_, param) in zip(unwrapped_names([name for name, _ in everything], module), everything, strict=True):
        if param in named and name not in found[named[param]]:
            found[named[param]].append(name)
    return found


def _pairs(item: Any) -> Iterator[tuple[str | None, Tensor]]:
    if isinstance(item, Mapping):
        inner = item.get("params", ())
        inner = [inner] if isinstance(inner, Tensor) else list(inner)
        names = item.get("param_names")
        for each in inner if names is None else zip(names, inner, strict=True):
            yield from _pairs(each)
        return
    name, param = item if isinstance(item, tuple) and len(item) == 2 else (None, item)
    if not isinstance(param, Tensor) or not isinstance(name, (str, type(None))):
        raise TypeError(f"params must have tensors, (name, tensor) pairs or param groups, got {type(item).__name__}")
    yield name, param


def unwrapped_names(names: Sequence[str], module: nn.Module | None) -> list[str]:
    """Returns the names without the parts that wrappers add. Raises ``ValueError`` where two become equal."""
    found = [without_wrappers(name) for name in names]
    under_ddp = module is None or isinstance(module, DistributedDataParallel)
    if under_ddp and all(name.startswith(DDP_PREFIX) for name in found):
        found = [name.removeprefix(DDP_PREFIX) for name in found]
    if len(set(found)) < len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise ValueError(f"two parameters have the name {twice!r}: averages are saved by name, so names must differ")
    return found


def named_in(module: nn.Module) -> dict[str, Tensor]:
    """Returns all parameters of ``module`` by their names without wrappers' parts, tied ones by each name."""
    pairs = list(module.named_parameters(remove_duplicate=False))
    names = unwrapped_names([name for name, _ in pairs], module)
    return dict(zip(names, (param for _, param in pairs), strict=True))
