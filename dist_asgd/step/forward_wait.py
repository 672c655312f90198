"""Overlap of the all-gather of parameters with the next forward: each module waits for its own parameters."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from dist_asgd._torch_private import outside_graphs
from dist_asgd.buckets.base import Bucket
from dist_asgd.buckets.hooks import remove_hooks

CONTAINERS = (nn.ModuleList, nn.Sequential)


class ForwardWaits:
    """Hooks of a model that wait for parameters before a forward, and before ``state_dict()`` of any of its modules.

    A module may read the parameters of any submodule without calling the submodule (``MultiheadAttention`` does, and
    ``TransformerEncoderLayer`` in its fast path). So a module waits for all parameters below it. Exempt are the members
    of a ``ModuleList`` or ``Sequential`` below it: they are called as modules, and then wait by their own hooks.

    Args:
        module: the model; None if the optimizer was not given one, and then nothing is hooked.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self.module = module
        self._hooks: list[RemovableHandle] = []
        weakref.finalize(self, remove_hooks, self._hooks)
        self._covered: set[int] = set()  # ids of the parameters that a hook waits for
        # By the class of what may replace a parameter: module, attribute, full name and parameter. FSDP registers whole
        # parameters during forward and backward, so that only DTensors count in the place of shards.
        self._owned: defaultdict[Any, list[tuple[nn.Module, str, str, nn.Parameter]]] = defaultdict(list)

    def attach(self, buckets: Sequence[Bucket]) -> None:
        """Hooks the modules that have parameters in ``buckets``. torch.compile breaks its graph at each hook."""
        if self.module is None:
            return
        owner = {id(param): bucket for bucket in buckets for param in bucket.params}
        gathered = {bucket for bucket in buckets if bucket.may_gather_late}
        called = set(_called_members(self.module))
        for prefix, submodule in self.module.named_modules():
            needed = {owner[id(param)] for param in _parameters_read_by(submodule, called) if id(param) in owner}
            if needed & gathered:
                # Prepended: the hooks of weight_norm and of pruning compute weights from parameters.
                hook = submodule.register_forward_pre_hook(_WaitHook(needed & gathered), prepend=True)
                self._hooks.append(hook)
            own = list(submodule.named_parameters(recurse=False))
            late = {owner[id(param)] for _, param in own if id(param) in owner} & gathered
            if late:  # a wrapped model or a part has its state_dict() called without the modules around it
                self._hooks.append(submodule.register_state_dict_pre_hook(_WaitHook(late)))
            for name, param in own:
                bucket = owner.get(id(param))
                if bucket is None:
                    continue
                if bucket.may_gather_late:
                    self._covered.add(id(param))
                owned = self._owned[nn.Parameter if bucket.always_registered else DTensor]
                owned.append((submodule, name, f"{prefix}.{name}".lstrip("."), param))

    def clear(self) -> None:
        """Removes all hooks, before the buckets are built again."""
        remove_hooks(self._hooks)
        self._hooks.clear()
        self._covered.clear()
        self._owned.clear()

    def replaced(self) -> dict[int, nn.Parameter]:
        """Returns the parameters that the model holds now in the place of others, by the ``id`` of the former ones."""
        found = [
            (param, getattr(submodule, attribute, param), kind)
            for kind, owned in self._owned.items()
            for submodule, attribute, _, param in owned
        ]
        return {id(param): new for param, new, kind in found if new is not param and isinstance(new, kind)}

    def check(self) -> None:
        """Raises ``RuntimeError`` where the model holds another parameter now than when ``attach`` hooked it."""
        for submodule, attribute, name, param in self._owned[nn.Parameter]:
            found = getattr(submodule, attribute, param)
            if found is not param and isinstance(found, nn.Parameter):
                raise RuntimeError(
                    f"parameter {name!r} of the module was replaced after the optimizer was built "
                    "(fully_shard, parallelize_module, load_state_dict(assign=True)?): the optimizer does not know the "
                    "new one, build it again"
                )

    def covers(self, bucket: Bucket) -> bool:
        """Whether a hook waits for every parameter of the bucket, so that ``step()`` need not."""
        return bool(self._covered) and self._covered.issuperset(map(id, bucket.params))


def _called_members(module: nn.Module) -> list[nn.Module]:
    """Returns the outermost members of the containers in ``module`` that are no containers themselves."""
    called: list[nn.Module] = []
    for child in module.children():
        if type(module) in CONTAINERS and type(child) not in CONTAINERS:
            called.append(child)
        else:
            called += _called_members(child)
    return called


def _parameters_read_by(module: nn.Module, without: set[nn.Module]) -> list[nn.Parameter]:
    """Returns the parameters of ``module`` and its submodules, leaving out the submodules ``without``."""
    params = list(module.parameters(recurse=False))
    for child in module.children():
        if child not in without:
            params += _parameters_read_by(child, without)
    return params


class _WaitHook:
    """Hook that waits for buckets. A copy of it waits for none: a copied module has parameters of its own."""

    def __init__(self, buckets: set[Bucket]) -> None:
        self._buckets = weakref.WeakSet(buckets)  # the module may outlive the optimizer

    @outside_graphs
    def __call__(self, *_: Any) -> None:
        for bucket in self._buckets:
            bucket.wait()

    def __deepcopy__(self, memo: dict[int, Any]) -> _WaitHook:
        return _WaitHook(set())

    def __reduce__(self) -> tuple[type[_WaitHook], tuple[set[Bucket]]]:
        return _WaitHook, (set(),)
