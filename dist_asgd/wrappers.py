"""What FSDP and DistributedDataParallel have besides parameters: whole copies for forward, and a ``no_sync`` each."""

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

from dist_asgd._torch_private import free_fsdp1_copy, fsdp2_copies, is_fsdp1_slice, modules_with_state


class ParallelModules:
    """The modules of FSDP and DistributedDataParallel in ``module``."""

    def __init__(self, module: nn.Module | None) -> None:
        self._module = module

    def drop_copies(self) -> None:
        """Frees FSDP's whole copies: the next forward gathers them again, from what the parameters are then."""
        for module in [] if self._module is None else list(self._module.modules()):
            if isinstance(module, FSDPModule):
                module.reshard()
            elif isinstance(module, FullyShardedDataParallel):
                free_fsdp1_copy(module)

    def refuse_old_graphs(self) -> None:
        """Parameters have changed: from now on autograd refuses a backward of a forward from before.

        Elsewhere it does so by itself. FSDP2 gathers anew for backward what it has freed since, and that has changed.
        """
        for module in [] if self._module is None else self._module.modules():
            if isinstance(module, FSDPModule):
                # Those that were made in inference mode have no version. Nor had their forward a graph.
                gathered = [tensor for tensor in fsdp2_copies(module) if not tensor.is_inference()]
                torch.autograd.graph.increment_version(gathered)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, backward leaves the gradients on this rank, as far as modules know how."""
        with contextlib.ExitStack() as stack:
            # FSDP1 and DistributedDataParallel see to what is below them.
            if isinstance(self._module, (FullyShardedDataParallel, DistributedDataParallel)):
                stack.enter_context(self._module.no_sync())
            for module in [] if self._module is None else self._module.modules():
                if isinstance(module, FSDPModule):
                    module.set_requires_gradient_sync(False, recurse=False)
                    stack.callback(module.set_requires_gradient_sync, True, recurse=False)
            yield

    def full_state_dict(self, optimizer: Optimizer, rank: int) -> dict[str, Any]:
        """torch's state dict of the whole parameters on rank 0, ``{}`` on the others, of an optimizer of slices.

        Collective. Raises ``RuntimeError`` where nothing knows what the slices are of.
        """
        module = self._module
        if module is None or not any(isinstance(child, FullyShardedDataParallel) for child in module.modules()):
            raise RuntimeError(
                "slices do not know the parameters that they are parts of: pass module= (the model that FSDP has "
                "wrapped) to ShardedASGD, or ask get_optimizer_state_dict(model, optimizer)"
            )
        # With cpu_offload, FSDP1 does not copy what is on the CPU: all tensors of a parameter would be the last one.
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

    def unknown_copies(self, params: Sequence[Tensor]) -> RuntimeError | None:
        """The error where others than the modules in ``module`` may have copies of ``params``."""
        ours = set(map(id, params))
        known = set() if self._module is None else set(self._module.modules())
        slices = any(is_fsdp1_slice(param) for param in params)
        unknown = slices and not any(isinstance(module, FullyShardedDataParallel) for module in known)
        if modules_with_state is None:
            unknown |= self._module is None and any(isinstance(param, DTensor) for param in params)
        for module in modules_with_state or ():
            if isinstance(module, FSDPModule) and module not in known:
                module.reshard()  # only then its parameters are those that the optimizer has
                unknown |= any(id(param) in ours for param in module.parameters())
        if not unknown:
            return None
        return RuntimeError(
            "FSDP may have whole copies of parameters from the last forward, which have to be dropped when averages "
            "are swapped in and out: pass module= (the model that FSDP has wrapped) to ShardedASGD"
        )
