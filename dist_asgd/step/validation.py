"""Checks, on one rank, of arguments, param groups, parameters, gradients and state dicts: bad ones raise."""

from __future__ import annotations

import bisect
import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FlatParameter, FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from dist_asgd._torch_private import AsyncCollectiveTensor, fsdp2_named_parameters, modules_with_state
from dist_asgd.asgd.schedule import Hyperparameters
from dist_asgd.buckets.base import Bucket, require_private
from dist_asgd.buckets.local_tensors import is_placed
from dist_asgd.buckets.replicas import mesh_ranks
from dist_asgd.sharding.placement import Placement
from dist_asgd.sharding.shard_views import local_of

Groups = list[dict[str, Any]]  # optimizer.param_groups


def check_arguments(
    *,
    gradients: object,
    find_unused_parameters: object,
    bucket_bytes: object,
    master_weights: object,
    average_dtype: object,
    wire_dtype: object,
    stochastic_rounding: object,
    shard_replicas: object,
    capturable: object,
    verify_every: object,
    module: object,
    unknown: Mapping[str, object],
) -> None:
    """Validates the keyword arguments of ``ShardedASGD`` that are no options of param groups.

    Args:
        unknown: keyword arguments that ``ShardedASGD`` does not have.

    Raises:
        ValueError, TypeError: naming the argument, its value and the allowed values.
    """
    if unknown:
        raise TypeError(f"ShardedASGD has no option {', '.join(map(repr, unknown))}")
    if gradients not in ("local", "reduced", "sharded"):
        raise ValueError(f"gradients must be 'local', 'reduced' or 'sharded', got {gradients!r}")
    if isinstance(bucket_bytes, bool) or not isinstance(bucket_bytes, int | None):
        raise TypeError(f"bucket_bytes must be an int or None, got {bucket_bytes!r}")
    if bucket_bytes is not None and bucket_bytes <= 0:
        raise ValueError(f"bucket_bytes must be > 0, got {bucket_bytes}")
    for name, dtype in (("average_dtype", average_dtype), ("wire_dtype", wire_dtype)):
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"{name} must be a floating-point torch.dtype or None, got {dtype!r}")
    if isinstance(wire_dtype, torch.dtype) and wire_dtype.itemsize == 1:
        raise TypeError(f"wire_dtype must be torch.bfloat16, float16, float32 or float64, got {wire_dtype}")
    if isinstance(wire_dtype, torch.dtype) and wire_dtype.itemsize < 4 and not master_weights:
        raise ValueError(f"wire_dtype={wire_dtype} rounds parameters, which takes masters: pass master_weights=True")
    if module is not None and not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be a torch.nn.Module or None, got {module!r}")
    flags = {"find_unused_parameters": find_unused_parameters, "master_weights": master_weights}
    flags |= {"shard_replicas": shard_replicas, "stochastic_rounding": stochastic_rounding, "capturable": capturable}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    if stochastic_rounding and master_weights:
        raise ValueError(
            "stochastic_rounding is for bf16 parameters without masters: pass master_weights=False. With masters, "
            "rounding loses nothing"
        )
    check_verify_every(verify_every)
    if verify_every is not None and capturable:
        raise ValueError(
            "verify_every and capturable=True: ranks compare their copies on the CPU, which a CUDA graph cannot hold. "
            "Leave out one of them"
        )


def check_verify_every(verify_every: object) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless ``verify_every`` is None or an int > 0."""
    if verify_every is None:
        return
    if isinstance(verify_every, bool) or not isinstance(verify_every, int):
        raise TypeError(f"verify_every must be an int (a number of steps) or None, got {verify_every!r}")
    if verify_every <= 0:
        raise ValueError(f"verify_every must be > 0 steps, or None for no comparison, got {verify_every}")


def check_last_group(groups: Groups, ranks: Sequence[int]) -> None:
    """Validates the options and the parameters of the last one of ``groups``. Not collective.

    Args:
        groups: ``optimizer.param_groups``, of which all but the last have passed.
        ranks: the ranks of the optimizer, numbered as in the default process group.

    Raises:
        ValueError, TypeError: naming the option or the parameter.
    """
    _check_implementation(groups[-1])
    h = Hyperparameters.of(groups[-1])
    if h.device_lr is not None:
        replace(h, lr=h.device_lr.item())  # steps leave its value on the device, so it is validated only here
    names = parameter_names(groups[-1], len(groups) - 1)
    check_parameters(zip(names, groups[-1]["params"], strict=True), ranks)
    _check_memory(groups)


def check_parameters(named: Iterable[tuple[str, Tensor]], ranks: Sequence[int]) -> None:
    """Raises ``ValueError``, naming it, for a parameter that has no values, or whose state cannot be sharded.

    Args:
        named: names and parameters.
        ranks: the ranks that share state, numbered as in the default process group.
    """
    reaches: dict[DeviceMesh, bool] = {}  # once a mesh, because it looks at every rank of the mesh
    for name, param in named:
        _check_parameter(name, param)
        if isinstance(param, DTensor):
            mesh = param.device_mesh
            if mesh not in reaches:
                reaches[mesh] = set(mesh_ranks(mesh)) <= set(ranks) and mesh.get_coordinate() is not None
            _check_dtensor(name, param, ranks, reaches[mesh])


def _check_implementation(group: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` where a group asks for an implementation of torch.optim.ASGD that does not exist here."""
    if group["foreach"] not in (None, False):
        raise ValueError(
            f"foreach={group['foreach']!r}: a step here updates many parameters at once anyway, with the bits of "
            "torch.optim.ASGD(foreach=False), from which foreach=True differs. Leave it out"
        )
    if group["differentiable"] is not False:
        raise ValueError(
            f"differentiable={group['differentiable']!r}: autograd does not record a step here, since it writes to the "
            "memory of parameters. Use torch.optim.ASGD to differentiate through steps"
        )


def _check_parameter(name: str, param: Tensor) -> None:
    if isinstance(param, FlatParameter):
        raise ValueError(
            f"parameter {name!r} is a FlatParameter, in which FSDP has joined several parameters: pass "
            "use_orig_params=True to FSDP"
        )
    if is_lazy(param):
        raise ValueError(f"parameter {name!r} has no shape yet: run a forward of its lazy module first")
    if param.is_meta:
        raise ValueError(f"parameter {name!r} is on the meta device; materialize the model (model.to_empty(...)) first")
    if param.layout is not torch.strided:
        raise ValueError(f"parameter {name!r} has layout {param.layout}; expected a dense tensor")
    if not (param.is_floating_point() or param.is_complex()) or param.element_size() == 1:
        raise ValueError(f"parameter {name!r} is {param.dtype}; expected floating-point (not fp8) or complex")


def _check_dtensor(name: str, param: DTensor, ranks: Sequence[int], reachable: bool) -> None:
    if not reachable:
        raise ValueError(
            f"parameter {name!r} is a DTensor on a mesh of ranks {mesh_ranks(param.device_mesh)}, and the optimizer "
            f"is for ranks {list(ranks)}: each of them must be in a mesh of some of them. Pass process_group=; for a "
            "mesh of one dim that is mesh.get_group()"
        )
    if any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"parameter {name!r} is a DTensor with {param.placements}, so no rank knows its values: redistribute it "
            "to Replicate or Shard"
        )
    local, placement = local_of(param), Placement.of(param)
    if hasattr(local, "__tensor_flatten__") and not isinstance(local, AsyncCollectiveTensor):
        raise ValueError(
            f"parameter {name!r} is a DTensor whose local tensor is a {type(local).__name__}, which keeps its values "
            "in other tensors, as torchao's float8 weights do; expected a plain tensor with memory of its own. Build "
            "the model with plain weights (for float8 all-gathers of torchao: enable_fsdp_float8_all_gather=False)"
        )
    if placement.flatten(local).data_ptr() != local.data_ptr():
        raise ValueError(
            f"parameter {name!r} is a DTensor whose local tensor has gaps or repeats (shape {tuple(local.shape)}, "
            f"strides {local.stride()}): make it contiguous()"
        )


def _check_memory(groups: Groups) -> None:
    """Raises ``ValueError`` where two parameters share memory, because each parameter gets memory of its own."""
    named = [
        (name, param)
        for number, group in enumerate(groups)
        for name, param in zip(parameter_names(group, number), group["params"], strict=True)
    ]
    spans = _spans(named)
    for (device, _, stop, name), (other_device, start, _, other) in itertools.pairwise(spans):
        if device == other_device and start < stop:
            raise ValueError(
                f"parameters {name!r} and {other!r} share memory, and here each gets its own. To tie them, let their "
                "modules hold the same Parameter (b.weight = a.weight, not b.weight.data = a.weight.data)"
            )


def check_aliases(groups: Groups, gradients: str, module: torch.nn.Module | None) -> None:
    """Raises ``ValueError`` where somebody else has the memory of a parameter that moves into a bucket.

    Notices memory that processes share and, if the model is known, its buffers and other parameters. A NumPy array or a
    tensor outside of the model cannot be told from a temporary one.

    Args:
        groups: ``optimizer.param_groups``.
        gradients: the optimizer's option, "local", "reduced" or "sharded".
        module: the model; None if the optimizer was not given one.
    """
    moved = [
        (name, param)
        for number, group in enumerate(groups)
        for name, param in zip(parameter_names(group, number), group["params"], strict=True)
        if not is_placed(param, gradients)
    ]
    for name, param in moved:
        require_private(name, param)
    known = {id(param) for group in groups for param in group["params"]}
    tensors = [] if module is None else [*module.named_parameters(), *module.named_buffers()]
    others = [pair for pair in tensors if id(pair[1]) not in known and not is_lazy(pair[1])]
    starts = _spans(moved)
    for device, start, stop, other in _spans(others) if moved else []:
        first = max(bisect.bisect_right(starts, (device, start)) - 1, 0)
        for moved_device, moved_start, moved_stop, name in starts[first : first + 2]:
            if device == moved_device and start < moved_stop and moved_start < stop:
                raise ValueError(
                    f"parameter {name!r} shares memory with {other!r} of the module, which the optimizer does not "
                    "have. It moves into a bucket here, and the other one would not follow: give one of them memory of "
                    "its own (clone()), or let the modules hold the same Parameter"
                )


def _spans(named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, int, int, str]]:
    """Returns device type, first and last address and name of this rank's block of each tensor, sorted."""
    local = [(name, local_of(tensor)) for name, tensor in named]
    return sorted(
        (tensor.device.type, tensor.data_ptr(), tensor.data_ptr() + _dense_bytes(tensor), name)
        for name, tensor in local
        if tensor.numel() and tensor.layout is torch.strided
    )


def _dense_bytes(param: Tensor) -> int:
    """Returns the bytes from the first to the last element, or of one element where the layout has gaps or repeats."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(param.shape, param.stride(), strict=True))
    return param.element_size() * (extent if extent == param.numel() else 1)


def check_state_dict(state_dict: object) -> None:
    """Raises ``TypeError`` for an object that is no mapping, and ``ValueError`` for an empty one."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"load_state_dict() needs a state dict on every rank, got {type(state_dict).__name__}")
    if not state_dict:
        raise ValueError(
            "the state dict is empty. full_state_dict() is {} on every rank but 0: broadcast rank 0's "
            "(torch.distributed.broadcast_object_list), or let every rank read it"
        )


def initialized_since(alone: bool) -> bool:
    """Whether there are several ranks now, and the optimizer was built before torch.distributed was initialized.

    Args:
        alone: whether the optimizer was built without a process group.
    """
    return alone and dist.is_initialized() and dist.get_world_size() > 1


def require_built_groups(alone: bool, groups: Groups, built: Sequence[Sequence[Tensor]]) -> None:
    """Raises ``RuntimeError`` where the world or the groups are not the ones that the optimizer was built for.

    Args:
        alone: whether the optimizer was built without a process group.
        groups: ``optimizer.param_groups`` now.
        built: the parameters of each group when it was added.
    """
    if initialized_since(alone):
        raise RuntimeError(
            "torch.distributed was initialized after the optimizer was built, so it would train this rank alone. Build "
            "it after init_process_group(); for one rank by itself, pass process_group=dist.new_group([rank])"
        )
    if len(groups) != len(built):
        raise RuntimeError(
            f"the optimizer has {len(groups)} param_groups and was built with {len(built)}: add groups by "
            "add_param_group(), and to take one away build another optimizer"
        )
    for number, (group, params) in enumerate(zip(groups, built, strict=True)):
        if len(group["params"]) != len(params) or not all(map(operator.is_, group["params"], params)):
            raise RuntimeError(
                f"param_groups[{number}] does not list the parameters that it was built with: add parameters by "
                "add_param_group(), freeze those that are not to be trained, or build another optimizer"
            )


def require_gradients(bucket: Bucket, present: Sequence[bool], under_ddp: bool) -> None:
    """Raises ``RuntimeError``, naming them, if parameters of ``bucket`` that are trained have no gradient.

    Args:
        present: for each parameter, whether this rank has a gradient.
        under_ddp: whether DistributedDataParallel was seen to average gradients as well.
    """
    ddp = "DistributedDataParallel averages the gradients: pass gradients='reduced' to ShardedASGD. " * under_ddp
    missing = [
        name
        for name, param, has in zip(bucket.names, bucket.params, present, strict=True)
        if param.requires_grad and not has
    ]
    if missing:
        raise RuntimeError(
            f"no gradient for parameter {some_of(missing)}. {ddp}Where ranks may leave parameters unused, pass "
            "find_unused_parameters=True; freeze those that are never used (requires_grad=False). If the model's "
            "parameters were replaced after the optimizer was built (fully_shard, parallelize_module, "
            "load_state_dict(assign=True)), pass module=, by which new ones are found until the first step, or build "
            "it again"
        )


def require_not_sharded_since(buckets: Sequence[Bucket]) -> None:
    """Raises ``RuntimeError`` if ``fully_shard`` has replaced parameters since the optimizer was built.

    The optimizer then holds parameters that are in no module and get no gradient, which torch's optimizers skip
    silently. A module counts as sharded since if each of its trained parameters has the name and shape of a parameter
    here that has no gradient: one of a teacher with the same names would have to lack all of its student's gradients.
    ``parallelize_module`` leaves no record; ``StepAgreement.warn_of_unused`` tells after some steps.
    """
    without = [
        (name, param)
        for bucket in buckets
        if bucket.always_registered
        for name, param in zip(bucket.names, bucket.params, strict=True)
        if param.grad is None and param.requires_grad
    ]
    for module in (modules_with_state or ()) if without else ():
        records = fsdp2_named_parameters(module) if isinstance(module, FSDPModule) else []
        replaced = [
            [name for name, param in without if param.shape == other.shape and _same_parameter(name, other_name)]
            for other_name, other in records
            if other.requires_grad
        ]
        if replaced and all(replaced):
            raise RuntimeError(
                f"parameter {some_of([names[0] for names in replaced])} has no gradient, and its module has a DTensor "
                "in its place: fully_shard was called after the optimizer was built, which replaces parameters. Build "
                "the optimizer after that, or pass module=, by which it finds the new ones"
            )


def _same_parameter(name: str, other: str) -> bool:
    """Returns whether two names can mean one parameter, named from different modules that contain it."""
    return f".{name}".endswith(f".{other}") or f".{other}".endswith(f".{name}")


def some_of(names: Sequence[object]) -> str:
    """Returns the first three of ``names`` and the number of the remaining ones, for a message."""
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def parameter_names(group: Mapping[str, Any], number: int) -> list[str]:
    """Returns a name for each parameter of group ``number``: the user's, or else its position."""
    return group.get("param_names") or [f"{index} of group {number}" for index in range(len(group["params"]))]


def drop_duplicates(group: dict[str, Any]) -> None:
    """Removes repeated parameters from a group, in place, so that each takes one step. torch only warns of them."""
    first = {param: index for index, param in reversed(list(enumerate(group["params"])))}
    for key in {"params", "param_names"} & group.keys():
        group[key] = [group[key][index] for index in sorted(first.values())]
