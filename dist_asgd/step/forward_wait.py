"""Lets the all-gather of parameters run under the next forward: each module waits for its own parameters."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dist_asgd.buckets.base import Bucket
from dist_asgd.buckets.hooks import remove_hooks

CONTAINERS = (nn.ModuleList, nn.Sequential)


class ForwardWaits:
    """Pre-forward hooks that wait for parameters, and a pre-hook on the module's ``state_dict()``.

    A module may read the parameters of any module below it without calling it (MultiheadAttention does, and whole
    Transformer layers in their fast path). So every module waits for all parameters below it, save those below the
    members of a ModuleList or Sequential: they are there to be called, and then wait for themselves.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self.module = module
        self._hooks: list[RemovableHandle] = []
        weakref.finalize(self, remove_hooks, self._hooks)
        self._covered: set[int] = set()
        self._owned: list[tuple[nn.Module, str, str, nn.Parameter]] = []  # module, attribute, full name, parameter

    def attach(self, buckets: Sequence[Bucket]) -> None:
        """Hooks the modules that are waited for. torch.compile breaks its graph at each of them."""
        if self.module is None:
            return
        owner = {id(param): bucket for bucket in buckets for param in bucket.params}
        gathered = {bucket for bucket in buckets if bucket.may_lag}
        units = set(_units(self.module))
        for submodule in self.module.modules():
            needed = {owner[id(param)] for param in _parameters(submodule, units) if id(param) in owner}
            if needed & gathered:
                # First: others (weight_norm's, pruning's) make weights from parameters.
                hook = submodule.register_forward_pre_hook(_Wait(needed & gathered), prepend=True)
                self._hooks.append(hook)
        if gathered:
            self._hooks.append(self.module.register_state_dict_pre_hook(_Wait(gathered)))
        for prefix, submodule in self.module.named_modules():
            for name, param in submodule.named_parameters(recurse=False):
                bucket = owner.get(id(param))
                if bucket is not None and bucket.may_lag:
                    self._covered.add(id(param))
                if bucket is not None and bucket.always_registered:
                    self._owned.append((submodule, name, f"{prefix}.{name}".lstrip("."), param))

    def check(self) -> None:
        """Raises ``RuntimeError`` where the module holds another parameter now than when it was hooked."""
        for submodule, attribute, name, param in self._owned:
            found = getattr(submodule, attribute, param)
            if found is not param and isinstance(found, nn.Parameter):
                raise RuntimeError(
                    f"parameter {name!r} of the module was replaced after the optimizer was built "
                    "(fully_shard, parallelize_module, load_state_dict(assign=True)?): the optimizer does not know the "
                    "new one, build it again"
                )

    def covers(self, bucket: Bucket) -> bool:
        """Whether every parameter of the bucket is waited for by a module."""
        return self._covered.issuperset(map(id, bucket.params))


def _units(module: nn.Module) -> list[nn.Module]:
    """The outermost members of the containers in ``module`` that are no containers themselves."""
    units: list[nn.Module] = []
    for child in module.children():
        if type(module) in CONTAINERS and type(child) not in CONTAINERS:
            units.append(child)
        else:
            units += _units(child)
    return units


def _parameters(module: nn.Module, without: set[nn.Module]) -> list[nn.Parameter]:
    """The parameters of ``module`` and of what is below it, but for the modules ``without``."""
    params = list(module.parameters(recurse=False))
    for child in module.children():
        if child not in without:
            params += _parameters(child, without)
    return params


class _Wait:
    """A hook. Copies and pickles of a module get one that waits for nothing: their parameters are their own."""

    def __init__(self, buckets: set[Bucket]) -> None:
        self._buckets = weakref.WeakSet(buckets)  # the module may outlive the optimizer

    @torch.compiler.disable
    def __call__(self, *_: Any) -> None:
        for bucket in self._buckets:
            bucket.wait()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Wait:
        return _Wait(set())

    def __reduce__(self) -> tuple[type[_Wait], tuple[set[Bucket]]]:
        return _Wait, (set(),)
