"""Finds what a cast load takes in place of rounded parameters: the masters that an optimizer keeps of them.

ShardedASGD keeps fp32 masters of bf16 and fp16 parameters, which are the roundings of them. A checkpoint has the master
of a parameter as ``<optimizer>.state.<parameter>.master``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dist_asgd.checkpoint.format.casts import copy_rounded
from dist_asgd.checkpoint.state.load_plan import MODULES, LoadPlan, is_castable
from dist_asgd.checkpoint.state.module_names import parameter_owners
from dist_asgd.checkpoint.state.tensor_blocks import to_fill
from dist_asgd.checkpoint.state.tree import Path

MASTER = "master"


def plan_parameter(plan: LoadPlan, path: Path, name: str, key: str, param: Tensor) -> None:
    """Plans to read a parameter: from its master if the checkpoint has one, and a dtype is cast.

    A master whose rounding is not the saved parameter is older than it, so the parameter counts there.

    Args:
        path: of the module in the checkpoint.
        name: of the parameter in the module.
        key: of the saved parameter, which fits ``param``.
    """
    saved = plan.tensors[key]
    master = _master_key(plan, path, name)
    if saved.dtype == param.dtype or master is None or plan.tensors[master].shape != saved.shape:
        plan.fill(key, param)
        return
    blocks = [block.data for block in to_fill(key, param).blocks]
    rounded = plan.fill_new(key, param, saved.dtype)
    masters = plan.fill_new(master, param, plan.tensors[master].dtype)

    def choose() -> None:
        for block, value, wide in zip(blocks, rounded, masters, strict=True):
            copy_rounded(block, torch.where(wide.to(value.dtype) == value, wide, value.to(wide.dtype)))

    plan.after_read(MODULES, choose)


def _master_key(plan: LoadPlan, path: Path, name: str) -> str | None:
    """Returns the key of the master of a parameter; None if there is none, or there are several."""
    children = plan.root.children.values()
    nodes = [child.at(("state", known, MASTER)) for child in children for known in plan.names_of(path, name)]
    keys = {node.key for node in nodes if node.key in plan.tensors}
    return keys.pop() if len(keys) == 1 else None


def saved_parameters(plan: LoadPlan, params: Mapping[str, Tensor], modules: Mapping[Path, nn.Module]) -> dict[str, str]:
    """Returns the keys of an optimizer's parameters in the checkpoint, by the optimizer's names; of some if unknown.

    Args:
        params: of the optimizer, by name.
        modules: live modules, by path. A parameter of none of them is looked for by its name and shape in the
            checkpoint.
    """
    owners, found = parameter_owners(modules), {}
    for name, param in params.items():
        if id(param) in owners:
            path, own_name = owners[id(param)]
            keys = {plan.root.at((*path, own_name)).key}
        else:
            nodes = [child.at((name,)) for child in plan.root.children.values()]
            keys = {node.key for node in nodes if node.key in plan.tensors}
            keys = {key for key in keys if plan.tensors[str(key)].shape == tuple(param.shape)}
        keys &= plan.tensors.keys()
        if len(keys) == 1:
            found[name] = str(keys.pop())
    return found


def fill_master(plan: LoadPlan, key: str | None, master: Tensor | None) -> bool:
    """Plans to read a parameter, saved with more precision than it has now, into ``master``. Returns whether it is.

    Args:
        key: of the saved parameter; None if it is unknown.
        master: a tensor to read into; None if the optimizer keeps no master.
    """
    if not plan.cast or key is None or master is None or plan.tensors[key].shape != tuple(master.shape):
        return False
    if not is_castable(plan.tensors[key].dtype, master.dtype):
        return False
    plan.fill(key, master)
    return True
