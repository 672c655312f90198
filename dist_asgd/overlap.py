"""Lets the all-gather of parameters run under the next forward: each module waits for its own parameters."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dist_asgd.replicated import Bucket


class ForwardWaits:
    """Pre-forward hooks on the submodules that own parameters, and a pre-hook on the module's ``state_dict()``.

    A parameter that is read elsewhere than in the forward of a module that owns it is not waited for.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self._module = module
        self._covered: set[int] = set()
        self._owned: list[tuple[nn.Module, str, str, nn.Parameter]] = []  # module, attribute, full name, parameter

    def attach(self, buckets: Sequence[Bucket]) -> None:
        """Hooks the submodules that own parameters of ``buckets``. torch.compile breaks its graph at each of them."""
        if self._module is None:
            return
        owner = {id(param): bucket for bucket in buckets for param in bucket.params}
        for prefix, submodule in self._module.named_modules():
            named = [(name, param) for name, param in submodule.named_parameters(recurse=False) if id(param) in owner]
            if named:
                submodule.register_forward_pre_hook(_Wait({owner[id(param)] for _, param in named}))
                self._covered.update(id(param) for _, param in named)
                self._owned += [(submodule, name, f"{prefix}.{name}".lstrip("."), param) for name, param in named]
        self._module.register_state_dict_pre_hook(_Wait(set(buckets)))

    def check(self) -> None:
        """Raises ``RuntimeError`` where the module holds another parameter now than when it was hooked."""
        for submodule, attribute, name, param in self._owned:
            found = getattr(submodule, attribute, param)
            if found is not param and isinstance(found, nn.Parameter):
                raise RuntimeError(
                    f"parameter {name!r} of the module was replaced after the optimizer was built "
                    "(load_state_dict(assign=True)?): the optimizer does not know the new one, build it again"
                )

    def covers(self, bucket: Bucket) -> bool:
        """Whether every parameter of the bucket is waited for by a module."""
        return self._covered.issuperset(map(id, bucket.params))


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
