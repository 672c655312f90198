"""Facts that must be equal on every rank, as (name, value) pairs of text: arguments, options and gradients.

``Agreement.require_equal`` (``comm/consensus.py``) compares the facts; a step compares only their fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_asgd.asgd.schedule import OPTIONS, Hyperparameters
from dist_asgd.averages.options import average_of
from dist_asgd.buckets.base import Bucket
from dist_asgd.buckets.local_tensors import is_placed
from dist_asgd.buckets.replicas import mesh_layout_of
from dist_asgd.comm.consensus import Facts, fingerprint
from dist_asgd.step.validation import Groups, parameter_names

_KINDS = ("frozen", "trained", "frozen, with a gradient", "trained, with a gradient")

# Facts about a parameter in a step, in words. Indices: 1 for trained, 2 for a gradient, 4 for a gradient with other
# placements than the parameter, or a sum of these.
PARAMETER_FACTS = (*_KINDS, *(f"{kind} in another placement" for kind in _KINDS))
TRAINED_WITH_GRADIENT = 3  # the index of nearly all


def argument_facts(arguments: Mapping[str, object], groups: Groups, first: int) -> Facts:
    """Returns what must be equal on every rank to build buckets for the param groups from index ``first`` on.

    Args:
        arguments: arguments of the optimizer by name.
        groups: ``optimizer.param_groups``.
    """
    facts = [(name, repr(value)) for name, value in arguments.items()]
    for number, group in enumerate(groups[first:], start=first):
        facts += [*option_facts(Hyperparameters.of(group), number), (f"average of group {number}", average_of(group))]
        named = list(zip(parameter_names(group, number), group["params"], strict=True))
        facts += parameter_facts(named, str(arguments["gradients"]))
    return facts


def parameter_facts(named: Sequence[tuple[str, Tensor]], gradients: str) -> Facts:
    """Returns what must be equal on every rank of parameters that share buckets.

    Args:
        named: names and parameters.
        gradients: the optimizer's option, "local", "reduced" or "sharded".
    """
    facts = []
    layouts = list(dict.fromkeys(mesh_layout_of(param) for _, param in named if isinstance(param, DTensor)))
    for name, param in named:
        kind = f"{param.dtype} on {param.device.type}"
        if isinstance(param, DTensor):
            mesh, placements = mesh_layout_of(param)
            where = f"a mesh {tuple(mesh.shape)} {mesh.mesh_dim_names} (number {layouts.index((mesh, placements))})"
            kind += f" as a DTensor of shape {tuple(param.shape)} with {placements} on {where}"
        elif is_placed(param, gradients):
            kind += " as a slice"
        else:
            kind += f" of shape {tuple(param.shape)} and strides {param.stride()}"
        facts.append((f"parameter {name!r}", f"{kind}, {'trained' if param.requires_grad else 'frozen'}"))
    return facts


def step_facts(
    options: Sequence[Hyperparameters], parameters: Mapping[Bucket, Sequence[int]], changes: Sequence[str]
) -> Facts:
    """Returns what must be equal on every rank for a step, in words that name a difference.

    Args:
        options: options of each param group.
        parameters: for each bucket, an index of ``PARAMETER_FACTS`` for each of its parameters.
        changes: what the user has done to gradients that are reduced already, in words.
    """
    facts = [fact for number, h in enumerate(options) for fact in option_facts(h, number)]
    for bucket, own in parameters.items():
        facts += [(f"parameter {name!r}", PARAMETER_FACTS[fact]) for name, fact in zip(bucket.names, own, strict=True)]
    return facts + [(f"change {number} of reduced gradients", change) for number, change in enumerate(changes, 1)]


def step_code(
    options: Sequence[Hyperparameters],
    parameters: Mapping[Bucket, Sequence[int]],
    begun: Sequence[tuple[Sequence[int], Sequence[str]]],
) -> int:
    """Returns a fingerprint, below 2**32, of ``step_facts`` and ``begun``. Cheap enough for every step.

    Args:
        options: options of each param group. An ``lr`` on a GPU is left out, because reading it would wait for the GPU.
        parameters: for each bucket, an index of ``PARAMETER_FACTS`` for each of its parameters.
        begun: for each bucket that reduces, the pass in which the gradient of each parameter was begun, and what the
            user has done to the gradients since.
    """
    known = [h if h.device_lr is None else replace(h, lr=0.0) for h in options]
    values = [_values(h) for h in known]
    # All buckets joined: ranks that have fewer rows of the DTensors may cut the same parameters into other buckets.
    return fingerprint((values, b"".join(map(bytes, parameters.values())), begun))


def option_facts(h: Hyperparameters, number: int) -> Facts:
    """Returns the options of param group ``number`` as facts."""
    return [(f"{name} of group {number}", repr(value)) for name, value in zip(OPTIONS, _values(h), strict=True)]


def _values(h: Hyperparameters) -> list[float | None]:
    values = [h.eta(0) if name == "lr" else getattr(h, name) for name in OPTIONS]
    return [None if value is None else float(value) for value in values]
