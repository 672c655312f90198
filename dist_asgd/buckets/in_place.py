"""``InPlaceBucket``: parameters that keep the memory in which they were found, and the all-gather of their shards."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_asgd._torch_private import local_tensor
from dist_asgd.buckets.base import MAX_IN_FLIGHT, PATIENCE, ParameterBucket, ShardingOptions, require_same
from dist_asgd.buckets.packing import Batch, Batches, Packer
from dist_asgd.buckets.replicas import ReplicaGroup
from dist_asgd.comm.collectives import Transfer
from dist_asgd.comm.streams import Completion, used_by_current_stream
from dist_asgd.kernels.tensor_list import as_real
from dist_asgd.sharding.layout import BucketLayout, Piece
from dist_asgd.sharding.placement import Placement
from dist_asgd.sharding.shard_views import PlacedParameters, local_of


class InPlaceBucket(ParameterBucket):
    """A bucket of parameters that keep their memory, wherever it lies.

    Args:
        named: parameters of one dtype and device, with names: DTensors of one mesh layout (see buckets/replicas.py),
            or plain tensors.
        layout: the layout of one buffer of all blocks.
        options: the options that all buckets share.
        replica_group: the ranks that hold equal blocks of the parameters; None for slices.
        in_flight: buckets whose all-gather is under way, oldest first; shared by all buckets that gather in turn.
    """

    def __init__(
        self,
        named: Mapping[Tensor, str],
        layout: BucketLayout,
        options: ShardingOptions,
        replica_group: ReplicaGroup | None,
        in_flight: deque[InPlaceBucket],
    ) -> None:
        params = tuple(named)
        placements = [Placement.of(param) for param in params]
        collectives = None if replica_group is None else replica_group.collectives(params[0].device)
        rank = 0 if collectives is None or replica_group is None else replica_group.ranks.index(options.rank)
        self._parameters = PlacedParameters(params, layout, placements, rank)
        super().__init__(named, layout, placements, self._parameters, rank, collectives, options)
        self.presharded = replica_group is None
        self.copy_ranks = () if replica_group is None or len(replica_group.ranks) == 1 else replica_group.ranks
        self.is_counted = self.collectives is not None or not self.copy_ranks or self.copy_ranks[0] == options.rank
        self._addresses = [flat.data_ptr() for flat in self._parameters.flats]
        self._packer = Packer(layout, placements, self._parameters.flats[0])
        own = self._parameters.view_of if self._updates_in_place() else None
        self._batches = Batches(self._parameters.pieces, layout, self.device, own)
        if self.collectives is not None:
            spans = [(position, span) for position, span in enumerate(layout.spans) if span.numel]
            self._whole = Batch.of([Piece(position, 0, span.numel, span.start) for position, span in spans])
        self._received: Tensor | None = None  # 1-D, the whole bucket in wire dtype, during the all-gather
        self._gather: Transfer | None = None
        self._complete = Completion()  # of the last all-gather
        self._in_flight = in_flight

    def _updates_in_place(self) -> bool:
        """Whether one kernel works on all pieces of the shard where they lie."""
        return self.shard.forms.fuse and all(type(flat) is Tensor for flat in self._parameters.flats)

    def check_parameters(self, *, leaves_shared: bool = False) -> None:
        if isinstance(self.params[0], DTensor):
            found: list[Tensor] = list(map(local_tensor, self.params))  # type: ignore[arg-type]
            if all(map(operator.is_, found, self._parameters.local)):
                return
        else:
            found = list(self.params)
        if list(map(Tensor.data_ptr, found)) == self._addresses:
            return
        found = list(map(local_of, self.params))
        for position, (name, local) in enumerate(zip(self.names, found, strict=True)):
            placement = self.placements[position]
            if self.presharded and local.shape != placement.shape and local.numel() >= placement.numel:
                raise RuntimeError(
                    f"parameter {name!r} has shape {tuple(local.shape)} now and was a slice of shape {placement.shape} "
                    f"when {self.built}. FSDP has put it together, as for a forward or by "
                    "summon_full_params(): leave that first"
                )
            require_same(name, local, self.dtype, self.device, placement.shape, self.built)
            self._parameters.local[position] = local
            self._parameters.flats[position] = placement.flatten(local)
            self._addresses[position] = local.data_ptr()
            self._batches.clear()
            self._known_writes -= 1  # the new memory may have other values

    @torch.no_grad()
    def start_gather(self, exact: bool = False) -> None:
        self._count_own_write()
        if self.collectives is None:
            return
        if len(self._in_flight) >= MAX_IN_FLIGHT:
            self._in_flight[0].make_room()
        received = torch.empty(self.layout.numel, dtype=self.dtype if exact else self.wire, device=self.device)
        own = received[self.shard.start : self.shard.stop]
        own.copy_(self._parameters.read())
        self._gather = self.collectives.start_gather(as_real(received), as_real(own))
        self._received = received
        self._in_flight.append(self)

    def make_room(self) -> None:
        """Waits for this all-gather, so that a further one may start.

        On a device the current stream waits, which bounds the memory there: it is reused in the order of the stream. A
        host waits at most ``PATIENCE`` seconds, in case a rank does not come.
        """
        on_host = self.collectives is not None and self.collectives.waits_on_host
        self.wait(PATIENCE if on_host else None)

    @torch.no_grad()
    def wait(self, seconds: float | None = None) -> None:
        if self._gather is None:
            self._complete.wait()
            return
        if not (seconds is None or self._gather.completes_within(seconds)):
            return
        self._gather.wait()
        if self._received is not None:
            flats = [self._parameters.flats[position] for position in self._whole.positions]
            values = self._received[self._whole.start : self._whole.stop].to(self.dtype)
            self._packer.split(self._whole, values, flats)
            used_by_current_stream(self._received)
        self._complete.record(self.device)
        self._in_flight.remove(self)
        self._gather = self._received = None
