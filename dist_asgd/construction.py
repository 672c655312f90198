"""How the parameters of a group become buckets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_asgd.agreement import Agreement, group_of_its_own
from dist_asgd.buckets import Bucket
from dist_asgd.gradients import Reducing
from dist_asgd.placed import build_placed, is_placed
from dist_asgd.replicas import Replicas
from dist_asgd.replicated import build_replicated
from dist_asgd.shards import Precision


class Construction:
    """What all buckets of an optimizer are built with.

    Args:
        group: the ranks of the optimizer; None for one process without torch.distributed. The buckets get groups of
            their own.
        reducing: where plain parameters go with gradients of this rank's own.
        gradients, bucket_bytes, master_weights, average_dtype, shard_replicas: of the optimizer.
    """

    def __init__(
        self,
        agreement: Agreement,
        group: dist.ProcessGroup | None,
        reducing: Reducing,
        *,
        gradients: str,
        bucket_bytes: int,
        master_weights: bool,
        average_dtype: torch.dtype | None,
        shard_replicas: bool,
        **_: Any,
    ) -> None:
        self.group = group_of_its_own(group)
        self._agreement, self._gradients, self._bucket_bytes = agreement, gradients, bucket_bytes
        self._reducing = reducing
        self._precision = Precision(master_weights, average_dtype)
        self._replicas = Replicas(agreement, group, shard_replicas)

    def buckets(self, named: Mapping[Tensor, str]) -> list[Bucket]:
        """For the parameters, with their names, of one group. Collective."""
        placed = {param: name for param, name in named.items() if is_placed(param, self._gradients)}
        plain = {param: name for param, name in named.items() if param not in placed}
        rank, world_size = self._agreement.rank, self._agreement.world_size
        replicated = build_replicated(
            plain,
            self._bucket_bytes,
            rank,
            world_size,
            self.group,
            self._precision,
            self._reducing if self._gradients == "local" and self.group is not None else None,
        )
        return [
            *replicated,
            *build_placed(
                placed, self._bucket_bytes, self._replicas, rank, self._precision, self.group, self._reducing
            ),
        ]
