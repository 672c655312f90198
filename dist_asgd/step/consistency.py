"""XXX docstring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch.distributed.tensor import DTensor

from dist_asgd.asgd.schedule import Hyperparameters
from dist_asgd.averages.options import average_of
from dist_asgd.buckets.base import Bucket
from dist_asgd.buckets.local_tensors import is_placed
from dist_asgd.buckets.replicas import family_of
from dist_asgd.comm.consensus import Facts, fingerprint
from dist_asgd.step.validation import (
    Groups,
    Options,
    parameter_names,
)

_KINDS = ("frozen", "trained", "frozen, with a gradient", "trained, with a gradient")


PARAMETER_FACTS = (*_KINDS, *(f"{kind} in another placement" for kind in _KINDS))


def argument_facts(arguments: Mapping[str, object], groups: Groups, first: int) -> Facts:
    """What must be the same on every rank to build the groups from ``first`` on."""
    facts = [(name, repr(value)) for name, value in arguments.items()]
    for number, group in enumerate(groups[first:], start=first):
        facts += [*option_facts(Hyperparameters.of(group), number), (f"average of group {number}", average_of(group))]
        families = list(dict.fromkeys(family_of(param) for param in group["params"] if isinstance(param, DTensor)))
        for name, param in zip(parameter_names(group, number), group["params"], strict=True):
            kind = f"{param.dtype} on {param.device.type}"
            if isinstance(param, DTensor):
                mesh, placements = family_of(param)
                where = (
                    f"a mesh {tuple(mesh.shape)} {mesh.mesh_dim_names} (number {families.index((mesh, placements))})"
                )
                kind += f" as a DTensor of shape {tuple(param.shape)} with {placements} on {where}"
            elif is_placed(param, str(arguments["gradients"])):
                kind += " as a slice"
            else:
                kind += f" of shape {tuple(param.shape)} and strides {param.stride()}"
            facts.append((f"parameter {name!r}", f"{kind}, {'trained' if param.requires_grad else 'frozen'}"))
    return facts


def step_facts(options: Options, shared: Mapping[Bucket, Sequence[int]]) -> Facts:
    """What must be the same on every rank for a step; ``shared``: for each parameter, an index of PARAMETER_FACTS."""
    facts = [fact for number, h in enumerate(options) for fact in option_facts(h, number)]
    for bucket, own in shared.items():
        facts += [(f"parameter {name!r}", PARAMETER_FACTS[fact]) for name, fact in zip(bucket.names, own, strict=True)]
    return facts


def step_code(options: Options, shared: Mapping[Bucket, Sequence[int]], begun: Sequence[Sequence[int]]) -> int:
    """A fingerprint of the same and of the passes in which gradients were ``begun``, cheap enough for every step."""
    known = [h if h.device_lr is None else replace(h, lr=0.0) for h in options]  # a step does not wait for a device
    values = [_values(h) for h in known]
    # Together: the buckets of DTensors may end elsewhere on ranks that have fewer rows.
    return fingerprint((values, b"".join(map(bytes, shared.values())), begun))


def option_facts(h: Hyperparameters, number: int) -> Facts:
    """The options of group ``number``."""
    return [(f"{name} of group {number}", repr(value)) for name, value in zip(h.__slots__, _values(h), strict=True)]


def _values(h: Hyperparameters) -> list[float | None]:
    return [None if (value := getattr(h, name)) is None else float(value) for name in h.__slots__]
