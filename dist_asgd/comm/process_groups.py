"""Makes the process groups that the optimizer and the checkpoints use beside those of the user."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import torch.distributed as dist

from dist_asgd._torch_private import timeout_of


def default_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Returns ``group``, or the group of all ranks if it is None, or None if torch.distributed is not initialized.

    Warns when torchrun started several processes and torch.distributed is not initialized.
    """
    if group is not None or dist.is_initialized():
        return dist.group.WORLD if group is None else group
    count = os.environ.get("WORLD_SIZE", "1")
    if dist.is_torchelastic_launched() and count != "1":
        warnings.warn(
            f"torchrun started {count} processes, but torch.distributed is not initialized: this optimizer trains this "
            "process alone. Call torch.distributed.init_process_group() before its first step",
            stacklevel=3,
        )
    return None


def check_group(group: object) -> None:
    """Raises ``ValueError`` if this rank is no member of ``group``, ``TypeError`` if it is neither a group nor None."""
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this rank is not in process_group; only its members build the optimizer")
    if not (group is None or isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup or None, got {group!r}")


def separate_group(group: dist.ProcessGroup | None, backend: str | None = None) -> dist.ProcessGroup | None:
    """Makes a new process group of the ranks of ``group``; returns None if there is only one rank. Collective.

    Collectives of one group are matched by their order. Backward starts the optimizer's collectives in the order in
    which gradients become ready, and other users of ``group`` (optimizers, DDP, SyncBatchNorm) have an order of their
    own, so the optimizer needs a separate group.

    The new group has the timeout of ``group``, whatever its backend. It lives until
    ``torch.distributed.destroy_process_group()``.

    Args:
        group: None for one process without torch.distributed.
        backend: as ``torch.distributed.new_group`` takes it; None for the backends of ``group``.
    """
    if group is None or dist.get_world_size(group) == 1:
        return None
    return separate_subgroup(group, dist.get_process_group_ranks(group), backend)


def separate_subgroup(
    group: dist.ProcessGroup, ranks: Sequence[int], backend: str | None = None
) -> dist.ProcessGroup | None:
    """Makes a new process group of ``ranks``, with the timeout of ``group``. Collective among ``ranks``.

    Args:
        ranks: global ranks, all of them members of ``group``.
        backend: as ``torch.distributed.new_group`` takes it; None for the backends of ``group``.
    """
    # torch names a group that only its members make by counting the groups that they are in: those counts must agree. A
    # group of all ranks is made by all of them, so its name depends on no such count.
    members_only = len(ranks) < dist.get_world_size()
    return dist.new_group(
        list(ranks),
        timeout=timeout_of(group),
        backend=backend or dist.get_backend_config(group),
        use_local_synchronization=members_only,
    )
