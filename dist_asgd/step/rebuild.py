"""Finds what has changed between the construction of an optimizer and its first step.

Frameworks build the optimizer first and then move, cast, wrap or shard the model. Until the first step nothing is lost
by building the buckets again, so ``ShardedASGD`` does it where ``BuiltFor`` finds that they no longer fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_asgd.buckets.base import Bucket
from dist_asgd.buckets.gradient_tensors import GradientPiece
from dist_asgd.buckets.local_tensors import is_placed
from dist_asgd.comm.consensus import Facts
from dist_asgd.comm.digests import digests
from dist_asgd.sharding.shard_views import local_of
from dist_asgd.step.consistency import argument_facts
from dist_asgd.step.forward_wait import ForwardWaits
from dist_asgd.step.validation import Groups, check_aliases, check_last_group, parameter_names

# Dtype, device and shape of this rank's block of a parameter, and whether it is sharded already.
Kind = tuple[torch.dtype, torch.device, torch.Size, bool]


class BuiltFor:
    """The parameters that the buckets were built for, and the ones that are in their places now.

    Args:
        gradients: the optimizer's option, "local", "reduced" or "sharded".
        forward_waits: knows where the model held each parameter, if the optimizer was given one.

    Attributes:
        final: whether a step was taken, after which the buckets stay.
    """

    def __init__(self, gradients: str, forward_waits: ForwardWaits) -> None:
        self.final = False
        self._gradients, self._forward_waits = gradients, forward_waits
        self._groups: Groups = []
        self._params: list[list[Tensor]] = []  # of each group, when its buckets were built
        self._kinds: list[list[Kind]] = []

    def add(self, group: dict[str, Any]) -> None:
        """Records the parameters of a param group whose buckets have just been built."""
        self._groups.append(group)
        self._params.append(list(group["params"]))
        self._kinds.append(list(map(self._kind, group["params"])))

    def clear(self) -> None:
        """Forgets all groups, before their buckets are built again."""
        self._groups, self._params, self._kinds = [], [], []

    def former_groups(self) -> Groups:
        """Returns the param groups with the parameters that the buckets were built for."""
        return [{**group, "params": params} for group, params in zip(self._groups, self._params, strict=True)]

    def current_groups(self) -> Groups:
        """Returns the param groups with the parameters that are to be trained now.

        A group lists them. Where the model holds another parameter in the place of a listed one, it is the other.
        """
        replaced = self._forward_waits.replaced()
        return [
            {**group, "params": [replaced.get(id(param), param) for param in group["params"]]} for group in self._groups
        ]

    def fits(self) -> bool:
        """Whether the parameters are the ones that the buckets were built for, and of the same kind."""
        for group, params, kinds in zip(self.current_groups(), self._params, self._kinds, strict=True):
            if list(map(id, group["params"])) != list(map(id, params)) or list(map(self._kind, params)) != kinds:
                return False
        return True

    def _kind(self, param: Tensor) -> Kind:
        return param.dtype, param.device, local_of(param).shape, is_placed(param, self._gradients)


def steps_loaded(buckets: Iterable[Bucket]) -> int:
    """Returns the largest number of steps that a parameter has taken, in a training whose state was loaded."""
    return max((run.scalars.read().step for bucket in buckets for run in bucket.shard.runs), default=0)


def check_rebuild(
    groups: Groups,
    former: Groups,
    buckets: Sequence[Bucket],
    ranks: Sequence[int],
    arguments: Mapping[str, object],
    module: nn.Module | None,
) -> Facts:
    """Validates that buckets for ``groups`` can take the place of ``buckets``. Not collective.

    Args:
        groups: the param groups, with the parameters of now.
        former: the param groups, with the parameters that ``buckets`` were built for.
        ranks: the ranks of the optimizer, numbered as in the default process group.
        arguments: the arguments of the optimizer that must be equal on every rank.
        module: the model; None if the optimizer was not given one.

    Returns:
        The facts that must be equal on every rank.

    Raises:
        ValueError, TypeError, RuntimeError: naming what does not fit.
    """
    loaded = steps_loaded(buckets)
    for number, (group, other) in enumerate(zip(groups, former, strict=True)):
        names, count = parameter_names(group, number), len(group["params"])
        if len(names) != count or (loaded and count != len(other["params"])):
            raise RuntimeError(
                f"param_groups[{number}] lists {count} parameters, and was built with {len(other['params'])}: add "
                "parameters by add_param_group(), or build another optimizer"
            )
        for name, param in zip(names, group["params"], strict=True):
            if isinstance(param.grad, GradientPiece):
                raise RuntimeError(
                    f"the gradient of parameter {name!r} was reduced before the model was changed (moved, cast, "
                    "wrapped or sharded). Drop the gradients (zero_grad()) and run another backward, or build the "
                    "optimizer after the change"
                )
        check_last_group(groups[: number + 1], ranks)
    check_aliases(groups, str(arguments["gradients"]), module)
    if loaded and any(bucket.presharded for bucket in buckets):
        raise RuntimeError(
            "FSDP1's slices were changed after a state was loaded, and slices cannot move their state: change the "
            "model first, then build the optimizer and load the state"
        )
    return [*argument_facts(arguments, groups, 0), ("steps in the state that was loaded", str(loaded))]


def value_facts(groups: Groups) -> Facts:
    """Returns digests of all plain parameters, which ranks must have alike where gradients of them are averaged."""
    named = [
        (name, param.detach())
        for number, group in enumerate(groups)
        for name, param in zip(parameter_names(group, number), group["params"], strict=True)
        if not is_placed(param, "local")
    ]
    found = digests([param for _, param in named])
    return [(f"the values of parameter {name!r}", str(one)) for (name, _), one in zip(named, found, strict=True)]
