"""Bytes of four ways to train one model: memory of a rank, what it sends in a step, and checkpoints.

Memory is what lies there when ``step()`` begins: parameters, gradients, optimizer state. Activations, messages under
way, and blocks that FSDP2 has gathered are not counted. Messages are counted as a ring sends them: (N-1)/N of a tensor
that N ranks gather, or scatter reduced, and twice that of a tensor that they add up.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_asgd.asgd.rounding import compute_dtype
from dist_asgd.planning.layouts import Layout, PlannedBucket, plan_layout
from dist_asgd.planning.model import ModelSizes, ParameterSize
from dist_asgd.sharding.precision import Precision

PRECISION = Precision(True, None, None, False, False)  # of ShardedASGD by default
SCALAR = 4  # bytes of the fp32 tensors in which torch.optim keeps step, eta and mu


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes of one way to train, on the rank that has most."""

    name: str
    parameters: int  # and persistent buffers
    gradients: int
    state: int  # of the optimizer, before averages begin
    averages: int  # which begin later
    sent: int  # in one step
    checkpoint: int  # of all ranks together, with averages
    written: int  # for a checkpoint

    @property
    def memory(self) -> int:
        """All that a rank keeps once averages have begun."""
        return self.parameters + self.gradients + self.state + self.averages


@dataclass(frozen=True, slots=True)
class Planner:
    """Makes estimates for one model.

    Attributes:
        model: the model.
        layout: how ``ShardedASGD`` and ``ShardedAverages`` have it. torch's optimizers beside them are under DDP.
        averages: the number of averages, at least 1.
        bucket_bytes: the size of buckets.
        sums_whole: whether the backend sums a whole tensor where a rank needs a part of it only, as gloo does.
    """

    model: ModelSizes
    layout: Layout
    averages: int
    bucket_bytes: int
    sums_whole: bool

    def estimates(self) -> list[Estimate]:
        """Returns the estimates, ours first."""
        return [self.sharded_asgd(), self.sharded_averages(), self.torch_asgd(), self.torch_adamw()]

    def buckets(self) -> list[PlannedBucket]:
        """Returns the buckets of the trained parameters on the rank that holds most."""
        return plan_layout(self.model, self.layout, self.bucket_bytes)

    # Ours ------------------------------------------------------------------------------------------------------------

    def sharded_asgd(self) -> Estimate:
        """Returns the estimate of ``ShardedASGD``."""
        buckets, reduces = self.buckets(), self.layout.name == "zero" and self.layout.world_size > 1
        gathered = sum(_part(bucket.nbytes, bucket.layout.world_size) for bucket in buckets)
        checkpoint = self._whole() + sum(p.numel * (_master(p) + self.averages * _average(p)) for p in self._trained())
        return Estimate(
            name="ShardedASGD",
            parameters=self._held(),
            gradients=sum(b.layout.shard_numel * _reduced(b) for b in buckets) if reduces else self._gradients(),
            state=sum(bucket.layout.shard_numel * _master(bucket) for bucket in buckets),
            averages=self._averages(buckets),
            sent=gathered + (gathered if reduces else self._sent_by_wrappers()),
            checkpoint=checkpoint,
            written=-(-checkpoint // self.layout.world_size),
        )

    def sharded_averages(self) -> Estimate:
        """Returns the estimate of ``ShardedAverages`` beside AdamW, under DDP where ranks hold the whole model."""
        moments = sum(2 * p.nbytes + SCALAR for p in self._trained())
        checkpoint = self._whole() + moments + sum(self.averages * p.numel * _average(p) for p in self._trained())
        return Estimate(
            name="AdamW + ShardedAverages",
            parameters=self._held(),
            gradients=self._gradients(),
            state=sum(2 * self._block(p) + SCALAR for p in self._trained()),
            averages=self._averages(self.buckets()),
            sent=self._sent_by_wrappers(),
            checkpoint=checkpoint,
            written=-(-checkpoint // self.layout.world_size),
        )

    # torch's ---------------------------------------------------------------------------------------------------------

    def torch_asgd(self) -> Estimate:
        """Returns the estimate of ``torch.optim.ASGD``, whose first average is always kept, with ``AveragedModel``."""
        state = sum(p.nbytes + 3 * SCALAR for p in self._trained())
        return self._under_ddp("DDP + torch.optim.ASGD", state, (self.averages - 1) * self._whole())

    def torch_adamw(self) -> Estimate:
        """Returns the estimate of ``torch.optim.AdamW`` without averages."""
        return self._under_ddp("DDP + AdamW, no average", sum(2 * p.nbytes + SCALAR for p in self._trained()), 0)

    def _under_ddp(self, name: str, state: int, averages: int) -> Estimate:
        ddp = Planner(self.model, Layout("ddp", self.layout.world_size), 1, self.bucket_bytes, self.sums_whole)
        checkpoint = self._whole() + state + averages
        return Estimate(
            name=name,
            parameters=self._whole(),
            gradients=ddp._gradients(),
            state=state,
            averages=averages,
            sent=ddp._sent_by_wrappers(),
            checkpoint=checkpoint,
            written=checkpoint,  # by rank 0
        )

    # Parts -----------------------------------------------------------------------------------------------------------

    def _trained(self) -> list[ParameterSize]:
        return [parameter for parameter in self.model.parameters if parameter.is_trained]

    def _whole(self) -> int:
        """Returns the bytes of the model."""
        return sum(parameter.nbytes for parameter in self.model.parameters) + self.model.buffer_bytes

    def _held(self) -> int:
        """Returns the bytes of the model on a rank."""
        return sum(self._block(parameter) for parameter in self.model.parameters) + self.model.buffer_bytes

    def _block(self, parameter: ParameterSize) -> int:
        return self.layout.block(parameter) * parameter.dtype.itemsize

    def _averages(self, buckets: list[PlannedBucket]) -> int:
        return self.averages * sum(bucket.layout.shard_numel * _average(bucket) for bucket in buckets)

    def _gradients(self) -> int:
        """Returns the bytes of gradients that others reduce. DDP has each a second time, in its own buckets."""
        under_ddp = self.layout.name == "ddp" or (self.layout.name == "zero" and self.layout.world_size > 1)
        return (1 + under_ddp) * sum(self._block(parameter) for parameter in self._trained())

    def _sent_by_wrappers(self) -> int:
        """Returns what FSDP2 and DDP send in a step. What tensor parallelism sends depends on the activations."""
        if self.layout.name == "tp":
            return 0
        shards, replicas, sent = self.layout.shards, self.layout.world_size // self.layout.shards, 0
        for parameter in self.model.parameters:
            block = self._block(parameter)
            gathered = _part(block * shards, shards)
            sent += 2 * gathered  # by FSDP2, for the forward and again for backward
            if parameter.is_trained:
                sent += gathered * (2 if self.sums_whole else 1) + 2 * _part(block, replicas)
        return sent


def _part(whole: int, ranks: int) -> int:
    """Returns the bytes that each of ``ranks`` sends so that all have a tensor of ``whole`` bytes."""
    return whole * (ranks - 1) // ranks


def _master(of: ParameterSize | PlannedBucket) -> int:
    """Returns the bytes of the master of an element."""
    return compute_dtype(of.dtype).itemsize if PRECISION.needs_master(of.dtype, of.dtype.to_real()) else 0


def _reduced(of: PlannedBucket) -> int:
    """Returns the bytes of an element of a gradient that ``ShardedASGD`` has reduced."""
    return compute_dtype(of.dtype).itemsize


def _average(of: ParameterSize | PlannedBucket) -> int:
    """Returns the bytes of an average of an element."""
    return PRECISION.average(of.dtype).itemsize
