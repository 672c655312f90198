"""XXX docstring."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import torch.distributed as dist

from dist_asgd._torch_private import timeout_of


def default_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """``group``, or all ranks; None where torch.distributed is not initialized, with a warning under torchrun."""
    if group is not None or dist.is_initialized():
        return dist.group.WORLD if group is None else group
    count = os.environ.get("WORLD_SIZE", "1")
    if dist.is_torchelastic_launched() and count != "1":
        warnings.warn(
            f"torchrun started {count} processes, but torch.distributed is not initialized: this optimizer trains this "
            "process alone. Call torch.distributed.init_process_group() before building it",
            stacklevel=3,
        )
    return None


def _check_group(group: object) -> None:
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this rank is not in process_group; only its members build the optimizer")
    if not (group is None or isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup or None, got {group!r}")


def group_of_its_own(group: dist.ProcessGroup | None, backend: str | None = None) -> dist.ProcessGroup | None:
    """Another group of the ranks of ``group``, by default of its backends; None for one rank. Collective.

    It has the timeout of ``group``, also where its backend is another: whoever set that meant all waiting.

    Collectives of one group are matched by their order. Those that backward starts follow the order in which gradients
    come, which is ours alone: other optimizers, DDP or SyncBatchNorm on the same ranks have theirs. The group lives
    until ``torch.distributed.destroy_process_group()``.
    """
    if group is None or dist.get_world_size(group) == 1:
        return None
    return subgroup_of_its_own(group, dist.get_process_group_ranks(group), backend)


def subgroup_of_its_own(
    group: dist.ProcessGroup, ranks: Sequence[int], backend: str | None = None
) -> dist.ProcessGroup | None:
    """The same of some of its ranks, in the numbers of all ranks. Collective among them."""
    # torch names a group that only its members make by counting the groups that they are in: those counts must agree. A
    # group of all ranks is made by all and needs no such luck.
    members_only = len(ranks) < dist.get_world_size()
    return dist.new_group(
        list(ranks),
        timeout=timeout_of(group),
        backend=backend or dist.get_backend_config(group),
        use_local_synchronization=members_only,
    )
