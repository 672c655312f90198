"""Control of the FSDP and DistributedDataParallel modules of a model: whole copies of parameters, and ``no_sync``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dist_asgd._torch_private import (
    free_fsdp1_copy,
    fsdp1_slices,
    fsdp2_copies,
    fsdp2_parameters,
    is_fsdp1_slice,
    modules_with_state,
)
from dist_asgd.sharding.placement import Placement


class ParallelModules:
    """The FSDP and DistributedDataParallel modules of one model.

    Args:
        module: the model, or None if it is not known; then nothing is controlled.
        owner: the class that users pass ``module`` to, for messages.
    """

    def __init__(self, module: nn.Module | None, owner: str = "ShardedASGD") -> None:
        self._module, self._owner = module, owner

    def drop_copies(self) -> None:
        """Frees the whole copies of parameters that FSDP holds; the next forward gathers the values of its time."""
        for module in [] if self._module is None else list(self._module.modules()):
            if isinstance(module, FSDPModule):
                module.reshard()
            elif isinstance(module, FullyShardedDataParallel):
                free_fsdp1_copy(module)

    def reshard(self) -> None:
        """Lets FSDP2's modules register their shards, where they have whole parameters from a forward."""
        for module in [] if self._module is None else self._module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def refuse_old_graphs(self) -> None:
        """Makes autograd refuse a backward through a forward that FSDP2 has run before this call.

        Called when the values of the parameters have changed. FSDP2 gathers freed parameters again for backward, which
        would then differ from the ones of the forward. Autograd notices a change of plain parameters without help.
        """
        for module in [] if self._module is None else self._module.modules():
            if isinstance(module, FSDPModule):
                # Tensors from inference mode have no version, and their forward has recorded no graph.
                gathered = [tensor for tensor in fsdp2_copies(module) if not tensor.is_inference()]
                torch.autograd.graph.increment_version(gathered)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside the block, backward under FSDP and DistributedDataParallel leaves the gradients on this rank."""
        with contextlib.ExitStack() as stack:
            # The ``no_sync`` of FSDP1 and DistributedDataParallel covers the modules below them, too.
            if isinstance(self._module, (FullyShardedDataParallel, DistributedDataParallel)):
                stack.enter_context(self._module.no_sync())
            for module in [] if self._module is None else self._module.modules():
                if isinstance(module, FSDPModule):
                    module.set_requires_gradient_sync(False, recurse=False)
                    stack.callback(module.set_requires_gradient_sync, True, recurse=False)
            yield

    def full_state_dict(self, optimizer: Optimizer, rank: int) -> dict[str, Any]:
        """Returns torch's state dict of an optimizer of FSDP1's slices, for whole parameters. Collective.

        Args:
            optimizer: the optimizer, whose parameters are slices.
            rank: this rank among the ranks of the optimizer.

        Returns:
            The state dict on rank 0, with tensors on the CPU; ``{}`` on other ranks.

        Raises:
            RuntimeError: where the model has no FSDP1 module, which alone knows the whole parameters.
        """
        module = self._module
        if module is None or not any(isinstance(child, FullyShardedDataParallel) for child in module.modules()):
            raise RuntimeError(
                "slices do not know the parameters that they are parts of: pass module= (the model that FSDP has "
                "wrapped) to ShardedASGD, or ask get_optimizer_state_dict(model, optimizer)"
            )
        # With cpu_offload, FSDP1 does not copy tensors that are on the CPU, so all would have the values of the last.
        copies = any(param.device.type != "cpu" for group in optimizer.param_groups for param in group["params"])
        options = StateDictOptions(full_state_dict=True, cpu_offload=copies)
        named: dict[str, Any] = get_optimizer_state_dict(module, optimizer, options=options)
        if rank != 0:
            return {}
        names = [name for group in named["param_groups"] for name in group["params"]]
        ids = {name: index for index, name in enumerate(names)}
        groups = [{**group, "params": [ids[name] for name in group["params"]]} for group in named["param_groups"]]
        state = {ids[name]: entry for name, entry in named["state"].items() if entry["step"]}
        return {"state": dict(sorted(state.items())), "param_groups": groups}

    def slices(self) -> dict[int, tuple[Placement, slice]]:
        """Returns, by ``id``, FSDP1's slices: the placement of the whole parameter, and the place in it, flattened."""
        modules = [] if self._module is None else self._module.modules()
        slices = [fsdp1_slices(module) for module in modules if isinstance(module, FullyShardedDataParallel)]
        return {id(param): (Placement.of(whole), where) for of_module in slices for param, whole, where in of_module}

    def require_known_copies(self, params: Sequence[Tensor]) -> None:
        """Raises ``RuntimeError`` where FSDP modules outside of ``module`` may hold whole copies of ``params``.

        Changes nothing: modules of other models keep the copies that they have.
        """
        ours = set(map(id, params))
        known = set() if self._module is None else set(self._module.modules())
        slices = any(is_fsdp1_slice(param) for param in params)
        unknown = slices and not any(isinstance(module, FullyShardedDataParallel) for module in known)
        if modules_with_state is None:
            unknown |= self._module is None and any(isinstance(param, DTensor) for param in params)
        for module in modules_with_state or ():
            if isinstance(module, FSDPModule) and module not in known:
                unknown |= any(id(param.sharded_param) in ours for param in fsdp2_parameters(module))
        if unknown:
            raise RuntimeError(
                "FSDP may have whole copies of parameters from the last forward, which have to be dropped when "
                "averages are swapped in and out: pass module= (the model that FSDP has wrapped) to " + self._owner
            )
