"""Tells when the optimizers that averages follow have taken a step, and whether they still hold the parameters."""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dist_asgd._torch_private import outside_graphs
from dist_asgd.step.cuda_graphs import scaling_of
from dist_asgd.step.validation import some_of

_version = operator.attrgetter("_version")  # how often torch has counted a write to a tensor


class Follower(Protocol):
    """Object that is told of the steps of optimizers, by their numbers."""

    def before_step(self, number: int) -> None: ...
    def after_step(self, number: int) -> None: ...


@runtime_checkable
class GathersLate(Protocol):
    """An optimizer whose ``step()`` may return before parameters are complete, as ``ShardedASGD`` with ``module``."""

    def synchronize(self) -> None: ...


class FollowedOptimizers:
    """Optimizers whose steps are followed, each by its own hooks, which do not keep the follower alive.

    Args:
        optimizers: the optimizers.
        follower: is told of their steps.
        named: the parameters that the follower is for, with their names.
    """

    def __init__(self, optimizers: Sequence[Optimizer], follower: Follower, named: Mapping[Tensor, str]) -> None:
        self._optimizers = tuple(optimizers)
        self._names: dict[int, str] = {}
        self._held = [_params(optimizer) for optimizer in self._optimizers]  # when last looked at
        self._unwritten: dict[int, int] = {}  # writes counted before a step that began without gradients
        self.add(named)
        alive = weakref.ref(follower)
        handles = [
            handle
            for number, optimizer in enumerate(self._optimizers)
            for handle in (
                optimizer.register_step_pre_hook(self._pre_hook(alive, number)),
                optimizer.register_step_post_hook(self._post_hook(alive, number)),
            )
        ]
        weakref.finalize(follower, _remove, handles)

    @property
    def count(self) -> int:
        """The number of optimizers."""
        return len(self._optimizers)

    def add(self, named: Mapping[Tensor, str]) -> None:
        """Adds parameters of the follower."""
        self._names |= {id(param): name for param, name in named.items()}

    def number_of(self, params: Sequence[Tensor]) -> list[int]:
        """Returns the number of the optimizer that has each parameter; 0 for one that none has."""
        held = {id(param): number for number, params in enumerate(self._held) for param in params}
        return [held.get(id(param), 0) for param in params]

    def synchronize(self) -> None:
        """Waits until all parameters are complete."""
        for optimizer in self._optimizers:
            if isinstance(optimizer, GathersLate):
                optimizer.synchronize()

    def check(self, number: int) -> None:
        """Raises ``RuntimeError``, naming parameters, where optimizer ``number`` has others in their place now.

        A parameter that is only taken out of its optimizer stays as it is.
        """
        if not self._optimizers:
            return
        former, found = self._held[number], _params(self._optimizers[number])
        if len(former) == len(found) and all(map(operator.is_, former, found)):
            return
        present = set(map(id, found))
        gone = [self._names[id(param)] for param in former if id(param) in self._names and id(param) not in present]
        known = set(map(id, former))
        new = [param for param in found if id(param) not in known and id(param) not in self._names]
        if gone and new:
            raise RuntimeError(
                f"parameter {some_of(gone)} of the averages is not in its optimizer any more, which has others instead:"
                " parameters were replaced (fully_shard, prepare() of a framework, parallelize_module) after "
                "ShardedAverages was built. Build it when the model and its optimizer are as they are trained"
            )
        self._held[number] = found

    def _pre_hook(self, alive: weakref.ref[Follower], number: int) -> Any:
        @outside_graphs
        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            follower = alive()
            if follower is None:
                return
            follower.before_step(number)
            self._unwritten.pop(number, None)
            if not _has_gradient(optimizer):
                self._unwritten[number] = _writes(optimizer)

        return before

    def _post_hook(self, alive: weakref.ref[Follower], number: int) -> Any:
        @outside_graphs
        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            follower = alive()
            if follower is not None and self._took_step(optimizer, number):
                follower.after_step(number)

        return after

    def _took_step(self, optimizer: Optimizer, number: int) -> bool:
        """Whether the call of ``step()`` that ends now was one: neither GradScaler nor a lack of gradients undid it."""
        scaling = scaling_of(optimizer)
        if scaling is not None and scaling.found_inf.item():
            return False
        before = self._unwritten.get(number)
        return before is None or _has_gradient(optimizer) or _writes(optimizer) != before


def _remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _params(optimizer: Optimizer) -> list[Tensor]:
    return list(itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups))


def _has_gradient(optimizer: Optimizer) -> bool:
    return any(param.grad is not None for group in optimizer.param_groups for param in group["params"])


def _writes(optimizer: Optimizer) -> int:
    return sum(map(_version, _params(optimizer)))
