"""What a user can get wrong: checks of arguments, parameters and gradients, and the facts that ranks must share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_asgd.agreement import Facts, fingerprint
from dist_asgd.replicated import Bucket
from dist_asgd.rule import Hyperparameters

Groups = Sequence[Mapping[str, Any]]  # optimizer.param_groups
Options = Sequence[Hyperparameters]  # of each group


def check_arguments(
    gradients: object, bucket_bytes: object, average_dtype: object, module: object, flags: Mapping[str, object]
) -> None:
    """Raises ``ValueError`` or ``TypeError`` that names the argument, its value and what it may be."""
    if gradients not in ("local", "reduced"):
        raise ValueError(f"gradients must be 'local' or 'reduced', got {gradients!r}")
    if isinstance(bucket_bytes, bool) or not isinstance(bucket_bytes, int):
        raise TypeError(f"bucket_bytes must be an int, got {bucket_bytes!r}")
    if bucket_bytes <= 0:
        raise ValueError(f"bucket_bytes must be > 0, got {bucket_bytes}")
    if average_dtype is not None and not (isinstance(average_dtype, torch.dtype) and average_dtype.is_floating_point):
        raise TypeError(f"average_dtype must be a floating-point torch.dtype or None, got {average_dtype!r}")
    if module is not None and not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be a torch.nn.Module or None, got {module!r}")
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def check_clip(max_norm: object, norm_type: object) -> Exception | None:
    """The error, if any, in arguments of ``clip_grad_norm_``."""
    for name, value, valid in (
        ("max_norm", max_norm, isinstance(max_norm, (int, float)) and max_norm >= 0),
        ("norm_type", norm_type, isinstance(norm_type, (int, float)) and norm_type > 0),
    ):
        if not valid:
            return ValueError(f"{name} must be a number {'> 0' if name == 'norm_type' else '>= 0'}, got {value!r}")
    return None


def check_parameter(name: str, param: Tensor) -> None:
    """Raises ``ValueError`` for a parameter that cannot be optimized, saying why."""
    if isinstance(param, DTensor):
        raise ValueError(f"parameter {name!r} is a DTensor; ShardedASGD shards plain tensors so far")
    if param.is_meta:
        raise ValueError(f"parameter {name!r} is on the meta device; materialize the model (model.to_empty(...)) first")
    if param.layout is not torch.strided:
        raise ValueError(f"parameter {name!r} has layout {param.layout}; expected a dense tensor")
    if not (param.is_floating_point() or param.is_complex()):
        raise ValueError(f"parameter {name!r} is {param.dtype}; expected a floating-point or complex dtype")


def require_gradients(bucket: Bucket, present: Sequence[bool]) -> None:
    """Raises ``RuntimeError`` that names the parameters of ``bucket`` which need a gradient and have none."""
    missing = [
        name
        for name, param, has in zip(bucket.names, bucket.params, present, strict=True)
        if param.requires_grad and not has
    ]
    if missing:
        some = ", ".join(map(repr, missing[:3])) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise RuntimeError(
            f"no gradient for parameter {some}. Where ranks may leave parameters unused, pass "
            "find_unused_parameters=True; freeze those that are never used (requires_grad=False). If the model's "
            "parameters were replaced after the optimizer was built (load_state_dict(assign=True)), build it again"
        )


def parameter_names(group: Mapping[str, Any], number: int) -> list[str]:
    """The names that the user gave, or positions."""
    return group.get("param_names") or [f"{index} of group {number}" for index in range(len(group["params"]))]


def drop_duplicates(group: dict[str, Any]) -> None:
    """torch warns of a parameter that a group lists twice; it is one parameter, and takes one step."""
    first = {param: index for index, param in reversed(list(enumerate(group["params"])))}
    for key in {"params", "param_names"} & group.keys():
        group[key] = [group[key][index] for index in sorted(first.values())]


def argument_facts(arguments: Mapping[str, object], groups: Groups, first: int) -> Facts:
    """What must be the same on every rank to build the groups from ``first`` on."""
    facts = [(name, repr(value)) for name, value in arguments.items()]
    for number, group in enumerate(groups[first:], start=first):
        facts += _option_facts(Hyperparameters.of(group), number)
        for name, param in zip(parameter_names(group, number), group["params"], strict=True):
            kind = f"{param.dtype} on {param.device.type} of shape {tuple(param.shape)} and strides {param.stride()}"
            facts.append((f"parameter {name!r}", f"{kind}, {'trained' if param.requires_grad else 'frozen'}"))
    return facts


def step_facts(options: Options, flags: Mapping[Bucket, Sequence[bool]], what: str) -> Facts:
    """What must be the same on every rank for a step; ``flags`` are facts about parameters, ``what`` they say."""
    facts = [fact for number, h in enumerate(options) for fact in _option_facts(h, number)]
    for bucket, own in flags.items():
        facts += [(f"{what} of parameter {name!r}", str(flag)) for name, flag in zip(bucket.names, own, strict=True)]
    return facts


def step_code(options: Options, flags: Mapping[Bucket, Sequence[bool]], begun: Sequence[Sequence[int]]) -> int:
    """A fingerprint of the same and of the passes in which gradients were ``begun``, cheap enough for every step."""
    values = [[float(getattr(h, name)) for name in h.__slots__] for h in options]
    return fingerprint((values, [bytes(own) for own in flags.values()], begun))


def _option_facts(h: Hyperparameters, number: int) -> Facts:
    return [(f"{name} of group {number}", repr(float(getattr(h, name)))) for name in h.__slots__]
