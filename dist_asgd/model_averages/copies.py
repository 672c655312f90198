"""Copies averages into another module, whatever the layout of either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dist_asgd._torch_private import is_fsdp1_slice, local_tensor
from dist_asgd.buckets.averaged import AveragedBucket
from dist_asgd.buckets.replicas import mesh_layout_of
from dist_asgd.comm.consensus import Agreement
from dist_asgd.model_averages.parameters import named_in, unwrapped_names
from dist_asgd.model_averages.state import Member
from dist_asgd.step.validation import some_of
from dist_asgd.wrappers import ParallelModules


@torch.no_grad()
def copy_averages(
    members: Sequence[Member], suffix: str, buffers: Mapping[str, Tensor], module: nn.Module, agreement: Agreement
) -> None:
    """Writes an average of every parameter, and ``buffers``, into ``module``. Collective.

    Args:
        members: the parameters that are averaged.
        suffix: the suffix of the average in the state.
        buffers: values by the names of buffers.
        module: has parameters and buffers of these names.
        agreement: among the ranks of the averages.

    Raises:
        ValueError, TypeError: on every rank, where ``module`` does not fit; nothing has changed then.
    """
    with agreement.together("copy_to()"):
        targets, target_buffers = _targets(members, buffers, module)
    bucket: AveragedBucket | None = None
    blocks: list[Tensor] = []
    for member in _by_bucket(members):
        if member.bucket is not bucket:
            bucket = member.bucket
            blocks = bucket.whole_averages(suffix)
        _write(targets[member.names[0]], bucket.shard.parameters.wrap(member.position, blocks[member.position]))
    for name, value in buffers.items():
        target_buffers[name].copy_(value)


def _by_bucket(members: Sequence[Member]) -> list[Member]:
    """Returns the members of one bucket after the other, in an order that is equal on every rank."""
    of_bucket: dict[int, list[Member]] = {}
    for member in members:
        of_bucket.setdefault(id(member.bucket), []).append(member)
    return [member for of_one in of_bucket.values() for member in of_one]


def _targets(
    members: Sequence[Member], buffers: Mapping[str, Tensor], module: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the parameters and buffers of ``module`` to write to. Raises where one is missing or does not fit."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"copy_to() needs a torch.nn.Module, got {type(module).__name__}")
    ParallelModules(module).drop_copies()  # otherwise FSDP2 has whole parameters here, whose values it drops later
    held = named_in(module)
    pairs = list(module.named_buffers(remove_duplicate=False))
    found = dict(zip(unwrapped_names([name for name, _ in pairs], module), (value for _, value in pairs), strict=True))
    names = [member.names[0] for member in members]
    missing = [name for name in names if name not in held] + [name for name in buffers if name not in found]
    if missing:
        raise ValueError(f"the module has no {some_of(missing)}: copy_to() needs a model of the averages' names")
    wrong = [member.names[0] for member in members if held[member.names[0]].shape != member.param.shape]
    wrong += [name for name, value in buffers.items() if found[name].shape != value.shape]
    if any(is_fsdp1_slice(param) for param in [*held.values(), *(member.param for member in members)]):
        raise ValueError("copy_to() does not know the whole parameters of FSDP1's slices: use fully_shard (FSDP2)")
    if wrong:
        raise ValueError(f"{some_of(wrong)} of the module has another shape than here")
    own = {id(member.param) for member in members}
    if any(id(held[name]) in own for name in names):
        raise ValueError("copy_to() into the averaged model itself would end its training: use averaged_parameters()")
    return held, found


def _write(target: Tensor, value: Tensor) -> None:
    """Writes ``value`` to ``target``, which may be placed otherwise. Collective where it is."""
    if not isinstance(target, DTensor):
        target.detach().copy_(value.full_tensor() if isinstance(value, DTensor) else value)
        return
    if not (isinstance(value, DTensor) and mesh_layout_of(target) == mesh_layout_of(value)):
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        value = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
    local_tensor(target).copy_(local_tensor(value))
