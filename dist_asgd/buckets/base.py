"""What all buckets have in common, wherever their parameters and gradients lie."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from dist_asgd.asgd.schedule import Hyperparameters, Scaling
from dist_asgd.averages.kinds import Average
from dist_asgd.averages.options import by_suffix
from dist_asgd.buckets.gradient_tensors import Reducing
from dist_asgd.comm.collectives import Collectives
from dist_asgd.sharding.layout import BucketLayout
from dist_asgd.sharding.placement import Placement
from dist_asgd.sharding.precision import Precision
from dist_asgd.sharding.shard import Shard
from dist_asgd.sharding.shard_views import ShardParameters

# Collectives (reductions of gradients, all-gathers of parameters) that a rank has under way at once. Two keep the link
# busy. Each holds buffers of its bucket's size.
MAX_IN_FLIGHT = 2

# Seconds that a rank waits for the oldest of them before it starts one more. Another rank may join late, at its step()
# or never, and the rank that waits for it without end might be the one that it waits for.
PATIENCE = 5.0


@dataclass(frozen=True, slots=True)
class Setting:
    """What all buckets of an optimizer are built with.

    Attributes:
        rank, world_size: this rank among those of the optimizer.
        group: those ranks; None for one.
        averages: by name; the first is ``ax``.
        reducing: what gradients ask of the optimizer.
    """

    rank: int
    world_size: int
    group: dist.ProcessGroup | None
    precision: Precision
    averages: Mapping[str, Average]
    bucket_bytes: int
    reducing: Reducing
    made: dict[str, Collectives] = field(default_factory=dict, init=False)  # by device type

    def collectives(self, device: torch.device) -> Collectives | None:
        """Between the ranks of ``group``. Collective when first called for a type of device."""
        if self.group is None:
            return None
        if device.type not in self.made:
            self.made[device.type] = Collectives.on(self.group, device)
        return self.made[device.type]


class Bucket(ABC):
    """Parameters of one group, dtype and device that are updated together, and this rank's shard of them.

    Args:
        named: the parameters with their names, for messages.
        layout: ``layout.spans[i]`` is where the i-th of them lies, or would if all were moved into one buffer.
        placements: of what this rank has of each.
        parameters: of the shard.
        rank: whose shard of ``layout`` this rank has.
        collectives: between the ranks that have the same of each parameter, each of which owns a shard; None where no
            other rank has it, or each rank is to have the whole state.
    """

    reduces = False  # whether gradients are the ranks' own, to be averaged here
    meets = False  # whether ranks must agree before each step, so that none is left waiting
    always_gathers = False  # whether a step has the all-gather also where no parameter of the bucket takes the step
    may_lag = False  # whether the parameters need not be complete when a step returns
    always_registered = False  # whether modules hold the parameters all the time, never something in their place
    whole_gradients = False  # whether ``p.grad`` is the whole gradient of a parameter, on every rank
    uneven = False  # whether a parameter may have a gradient on some ranks only, since others have none of its elements
    mirrors: Sequence[int] = ()  # the ranks that must have the same gradients, if nothing else makes sure of it

    def __init__(
        self,
        named: Mapping[Tensor, str],
        layout: BucketLayout,
        placements: Sequence[Placement],
        parameters: ShardParameters,
        rank: int,
        collectives: Collectives | None,
        setting: Setting,
    ) -> None:
        self.params, self.names, self.layout = tuple(named), tuple(named.values()), layout
        self.positions = {id(param): position for position, param in enumerate(self.params)}
        self.placements = tuple(placements)
        self.dtype, self.device = self.params[0].dtype, self.params[0].device
        self.collectives, precision = collectives if layout.numel else None, setting.precision
        self.wire = precision.wire(self.dtype)
        # The same wherever shards are cut; another for another bucket, or another block of the parameters.
        seed = zlib.crc32(repr((self.names[0], self.placements[0].offsets)).encode())
        rounding = precision.rounding(self.dtype, self.collectives is not None, seed)
        kinds = by_suffix(setting.averages)
        self.shard = Shard(parameters, layout, self.placements, rank, precision, rounding, kinds)

    def requires_grad(self) -> list[bool]:
        return [param.requires_grad for param in self.params]

    @abstractmethod
    def check_parameters(self) -> None:
        """Takes up parameters whose memory was replaced; raises ``RuntimeError`` where they do not fit any more."""

    @abstractmethod
    def check_gradients(self) -> list[bool]:
        """For each parameter, whether this rank has a gradient of it.

        Raises ``RuntimeError`` for a gradient that the rule has no meaning for, naming its parameter.
        """

    def find_gradients(self) -> bool:
        """Whether one look shows that all parameters and gradients are as expected, and nothing need be checked.

        Then they are held for the step.
        """
        return False

    def let_go(self) -> None:  # noqa: B027  # most hold nothing
        """There is no step after ``find_gradients``: drops what was held for it."""

    def has_misplaced(self) -> list[bool]:
        """For each parameter, whether ``place_gradients`` has to do something about its gradient."""
        return [False] * len(self.params)

    def place_gradients(self) -> None:  # noqa: B027  # most have nothing to do
        """After ranks have agreed: brings gradients to where their parameters are. Collective."""

    @abstractmethod
    def gradient_tensors(self) -> list[Tensor]:
        """Every tensor that holds values of the gradients on this rank, each value once."""

    @abstractmethod
    def owned_gradients(self) -> list[Tensor]:
        """The same or parts of them, so that over all ranks each element of each parameter is there once."""

    @abstractmethod
    def update(self, h: Hyperparameters, active: Sequence[bool] | None, scaling: Scaling | None = None) -> None:
        """One step of this rank's shard for the parameters that are ``active`` (None: all).

        Args:
            scaling: of the gradients; only where scalars are on the device.
        """

    @abstractmethod
    def start_gather(self, exact: bool = False) -> None:
        """Starts completing the parameters on every rank from the shards, which have changed. Collective.

        Args:
            exact: in the parameters' own dtype, whatever they are rounded to in a step.
        """

    @abstractmethod
    def wait(self, seconds: float | None = None) -> None:
        """Waits until the parameters are complete, at most ``seconds``; a later call goes on where this one gave up."""


def describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} on {tensor.device} of shape {tuple(tensor.shape)}"


def require_fitting(name: str, found: Tensor, dtype: torch.dtype, device: torch.device, shape: Sequence[int]) -> None:
    """Raises ``RuntimeError`` where parameter ``name`` is not what the optimizer was built for any more."""
    expected = f"{dtype} on {device} of shape {tuple(shape)}"
    if describe(found) != expected:
        raise RuntimeError(
            f"parameter {name!r} has become {describe(found)}; the optimizer was built for {expected}. "
            "Convert and shard the model (model.to(...), fully_shard(...)) before building the optimizer, or build it "
            "again"
        )


def require_dense(name: str, grad: Tensor) -> None:
    if grad.layout is not torch.strided:
        raise RuntimeError(f"parameter {name!r} has a sparse gradient; ASGD needs a dense one (sparse=False)")
