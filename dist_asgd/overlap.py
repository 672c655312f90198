"""Lets the all-gather of parameters run under the next forward: each module waits for its own parameters."""

from __future__ import annotations

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

    def attach(self, buckets: Sequence[Bucket]) -> None:
        """Hooks the submodules that own parameters of ``buckets``. torch.compile breaks its graph at each of them."""
        if self._module is None:
            return
        owner = {id(param): bucket for bucket in buckets for param in bucket.params}
        for submodule in self._module.modules():
            params = [param for param in submodule.parameters(recurse=False) if id(param) in owner]
            if params:
                submodule.register_forward_pre_hook(_Wait({owner[id(param)] for param in params}))
                self._covered.update(map(id, params))
        self._module.register_state_dict_pre_hook(_Wait(set(buckets)))

    def covers(self, bucket: Bucket) -> bool:
        """Whether every parameter of the bucket is waited for by a module."""
        return self._covered.issuperset(map(id, bucket.params))


class _Wait:
    """A hook. Copies and pickles of a module get one that waits for nothing: their parameters are their own."""

    def __init__(self, buckets: set[Bucket]) -> None:
        self._buckets = tuple(buckets)

    @torch.compiler.disable
    def __call__(self, *_: Any) -> None:
        for bucket in self._buckets:
            bucket.wait()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Wait:
        return _Wait(set())

    def __reduce__(self) -> tuple[type[_Wait], tuple[set[Bucket]]]:
        return _Wait, (set(),)
