"""``ParameterBucket`` and ``Bucket``, the interfaces of all buckets, and the options that they are built with."""

from __future__ import annotations

import operator
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from dist_asgd.asgd.schedule import Hyperparameters, Scalars, Scaling
from dist_asgd.averages.kinds import Average
from dist_asgd.averages.options import by_suffix
from dist_asgd.buckets.gradient_tensors import GradientSync
from dist_asgd.comm.collectives import Collectives
from dist_asgd.comm.consensus import fingerprint
from dist_asgd.comm.digests import digests
from dist_asgd.comm.process_groups import SeparateGroups
from dist_asgd.sharding.layout import DEVICE_BUCKET_BYTES, HOST_BUCKET_BYTES, BucketLayout
from dist_asgd.sharding.placement import Placement
from dist_asgd.sharding.precision import Precision
from dist_asgd.sharding.shard import Shard
from dist_asgd.sharding.shard_views import ShardParameters, local_of

# Collectives (reductions of gradients, all-gathers of DTensors) that a rank has under way at once. Two keep the link
# busy, and each holds buffers of its bucket's size.
MAX_IN_FLIGHT = 2

# Seconds that a host with MAX_IN_FLIGHT collectives under way waits for the oldest one before it starts one more. A
# rank without a backward joins reductions only in its step(), which waits for the other ranks, so a wait without a
# limit could last forever. The collectives of a device make no host wait.
PATIENCE = 5.0

# Bytes of the buckets whose reductions are under way on a device, if these are more than MAX_IN_FLIGHT: two buckets of
# the default size. While they are fewer, the device computes gradients and does not wait for other ranks, so that a
# link that is late for a moment holds nothing up.
DEVICE_BYTES = 2 * DEVICE_BUCKET_BYTES

_version = operator.attrgetter("_version")  # how often torch has counted a write to a tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardingOptions:
    """The options that all buckets of one optimizer, or of one ``ShardedAverages``, share.

    Attributes:
        rank: this rank among the ranks that share the state.
        world_size: the number of these ranks.
        groups: the process groups of these ranks; None for one rank.
        group: the group of all these ranks; None for one rank.
        precision: dtypes of averages, masters and messages.
        averages: the kinds of average by name; the first is saved as ``ax``.
        bucket_bytes: bytes of parameters after which a bucket is closed; None for the default of the device.
        offload: whether averages are kept in the memory of the host.
    """

    rank: int
    world_size: int
    groups: SeparateGroups | None
    group: dist.ProcessGroup | None
    precision: Precision
    averages: Mapping[str, Average]
    bucket_bytes: int | None
    offload: bool = False
    collectives_by_type: dict[str, Collectives] = field(default_factory=dict, init=False)  # by device type

    def max_numel(self, dtype: torch.dtype, device: torch.device, collectives: Collectives | None) -> int:
        """Returns the number of elements of ``dtype`` after which a bucket is closed, given its ``collectives``."""
        on_host = device.type == "cpu" or (collectives is not None and collectives.waits_on_host)
        default = HOST_BUCKET_BYTES if on_host else DEVICE_BUCKET_BYTES
        return (self.bucket_bytes or default) // dtype.itemsize

    def collectives(self, device: torch.device) -> Collectives | None:
        """Returns the collectives of ``group`` for ``device``; None for one rank.

        Collective when first called for a type of device.
        """
        if self.groups is None or self.group is None:
            return None
        if device.type not in self.collectives_by_type:
            ranks = dist.get_process_group_ranks(self.group)
            self.collectives_by_type[device.type] = Collectives.on(self.groups, ranks, device)
        return self.collectives_by_type[device.type]


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketOptions(ShardingOptions):
    """The options that all buckets of one optimizer share.

    Attributes:
        gradient_sync: by which gradients reach the optimizer.
    """

    gradient_sync: GradientSync


class ParameterBucket(ABC):
    """Parameters of one dtype and device whose state is kept together, and this rank's shard of them.

    Args:
        named: the parameters with their names, which are for messages.
        layout: the layout of one buffer of all parameters, in which span ``i`` belongs to parameter ``i``.
        placements: this rank's block of each parameter.
        parameters: access to the parameters of the shard.
        rank: the number of this rank's shard in ``layout``.
        collectives: among the ranks that have equal blocks of the parameters and share the optimizer state; None where
            this rank keeps the whole state of its blocks.
        options: the options that all buckets share.

    Attributes:
        presharded: whether parameters are slices that FSDP1 or the user has made, so that a rank may have no element
            of a parameter, and no gradient.
        copy_ranks: the ranks that hold copies of the blocks of the parameters, this rank included; empty if no other
            does. Where they share state, it would be of copies that differ.
        is_counted: whether norms over all ranks count this rank's shard. Where ranks with equal blocks each keep the
            whole state, the first of them is counted.
        built: what users have built of which the bucket is a part, in words, for messages.
        params, names: the parameters and their names, in the order of ``layout.spans``.
        positions: the position of each parameter in ``params``, by ``id``.
        wire: the dtype in which parameters are sent.
        shard: the shard that this rank owns, with its optimizer state.
    """

    presharded = False
    copy_ranks: Sequence[int] = ()
    is_counted = True
    built = "the optimizer was built"

    def __init__(
        self,
        named: Mapping[Tensor, str],
        layout: BucketLayout,
        placements: Sequence[Placement],
        parameters: ShardParameters,
        rank: int,
        collectives: Collectives | None,
        options: ShardingOptions,
    ) -> None:
        self.params, self.names, self.layout = tuple(named), tuple(named.values()), layout
        self.positions = {id(param): position for position, param in enumerate(self.params)}
        self.placements = tuple(placements)
        self.dtype, self.device = self.params[0].dtype, self.params[0].device
        self.collectives, precision = collectives if layout.numel else None, options.precision
        self.wire = precision.wire(self.dtype)
        # The seed depends on the parameters and the block and not on the rank, so results do not depend on where shards
        # are cut.
        seed = zlib.crc32(repr((self.names[0], self.placements[0].offsets)).encode())
        rounding = precision.rounding(self.dtype, self.collectives is not None, seed)
        kinds = by_suffix(options.averages)
        trained, offload = any(self.requires_grad()), options.offload
        self.shard = Shard(parameters, layout, self.placements, rank, precision, rounding, kinds, trained, offload)
        self._known_writes = self._writes()  # writes that the optimizer has made or ranks have compared

    def requires_grad(self) -> list[bool]:
        return [param.requires_grad for param in self.params]

    # Writes from outside ---------------------------------------------------------------------------------------------

    @property
    def was_written(self) -> bool:
        """Whether parameters were written to, other than by the optimizer, since ranks last had equal values.

        torch counts no writes to ``p.data`` or to the local tensor of a DTensor.
        """
        return bool(self.copy_ranks) and self._writes() != self._known_writes

    def note_equal_values(self) -> None:
        """Records that the values of the parameters are equal on all ``copy_ranks`` now."""
        self._known_writes = self._writes()

    def digest(self) -> int:
        """Returns a digest of the parameters' values on this rank."""
        return fingerprint(digests(self.value_tensors()))

    def value_tensors(self) -> list[Tensor]:
        """Returns tensors that hold all values of the parameters on this rank; there may be padding between them."""
        return [local_of(param) for param in self.params]

    def _count_own_write(self) -> None:
        # Autograd refuses a backward through old values by the version of a parameter, which kernels do not count.
        torch.autograd.graph.increment_version(self.params)
        self._known_writes += len(self.params)

    def _writes(self) -> int:
        return sum(map(_version, self.params))

    # Progress --------------------------------------------------------------------------------------------------------

    def furthest(self) -> Scalars | None:
        """Returns the scalars of the parameter that has taken the most steps; reads those on a device.

        Slices without elements, which take no steps on this rank, do not count. None where there is nothing else.
        """
        runs = self.shard.runs
        if self.presharded:
            runs = [run for run in runs if any(span.numel for span in self.layout.spans[run.first : run.stop])]
        return max((run.scalars.read() for run in runs), key=lambda scalars: scalars.step, default=None)

    # Memory of parameters --------------------------------------------------------------------------------------------

    @abstractmethod
    def check_parameters(self, *, leaves_shared: bool = False) -> None:
        """Finds parameters whose memory was replaced since the last call, and uses their new memory from now on.

        Raises ``RuntimeError``, which names the parameter, where dtype, device or shape have changed.

        Args:
            leaves_shared: whether a parameter may leave shared memory that it was moved to; otherwise that is a
                ``RuntimeError`` where the parameter would have to leave it.
        """

    @abstractmethod
    def start_gather(self, exact: bool = False) -> None:
        """Starts an all-gather of the changed shards, which completes the parameters on every rank. Collective.

        Args:
            exact: whether to send the dtype of the parameters also where a step rounds and sends a narrower one.
        """

    @abstractmethod
    def wait(self, seconds: float | None = None) -> None:
        """Waits until the parameters are complete, at most ``seconds``. A later call continues an interrupted wait."""


class Bucket(ParameterBucket):
    """Parameters of one param group, dtype and device that a step updates together, and this rank's shard of them.

    Attributes:
        reduces: whether the bucket averages gradients over ranks. Otherwise gradients arrive averaged.
        agrees_before_step: whether ranks must agree before each step, so that none waits for a rank with an error.
        always_gathers: whether a step has an all-gather also where no parameter of the bucket takes the step.
        may_gather_late: whether ``step()`` may return before the all-gather of the parameters is complete.
        always_registered: whether the parameters are registered in modules at all times. FSDP registers others during
            forward and backward.
        whole_gradients: whether ``p.grad`` is the whole averaged gradient of a parameter, on every rank.
        compared_ranks: ranks whose gradients must be equal though no collective of the optimizer makes them so: with
            ``gradients="reduced"``, and for replicas on other meshes. Empty if there are none.
            ``step/gradient_check.py`` compares them.
    """

    reduces = False
    agrees_before_step = False
    always_gathers = False
    may_gather_late = False
    always_registered = False
    whole_gradients = False
    compared_ranks: Sequence[int] = ()

    @abstractmethod
    def check_gradients(self) -> list[bool]:
        """Returns for each parameter whether this rank has a gradient of it.

        Raises ``RuntimeError``, which names the parameter, for a gradient that is sparse or has another shape, device
        or placement.
        """

    def find_gradients(self) -> bool:
        """Whether one fast scan finds all parameters and gradients as expected, so that no other check is needed.

        If so, the bucket holds the gradients for the next ``update()`` or until ``release_gradients()``.
        """
        return False

    def release_gradients(self) -> None:  # most buckets hold nothing
        """Drops the gradients that ``find_gradients()`` holds, where no step follows."""

    def has_misplaced(self) -> list[bool]:
        """Returns for each parameter whether ``place_gradients()`` has to redistribute its gradient."""
        return [False] * len(self.params)

    def place_gradients(self) -> None:  # only DTensors need it
        """Redistributes gradients to the placements of their parameters. Collective where ``has_misplaced()``."""

    @abstractmethod
    def gradient_tensors(self) -> list[Tensor]:
        """Returns tensors that hold all values of the gradients on this rank, each value once."""

    @abstractmethod
    def owned_gradients(self) -> list[Tensor]:
        """Returns parts of the gradients such that all ranks together have each element of each parameter once."""

    @abstractmethod
    def update(self, h: Hyperparameters, active: Sequence[bool] | None, scaling: Scaling | None = None) -> None:
        """Takes one step with this rank's shard. No communication.

        Args:
            h: the hyperparameters of the step.
            active: one flag for each parameter, whether it takes the step; None if all do.
            scaling: the scale of the gradients, from GradScaler; only where scalars are on the device.
        """


def describe(tensor: Tensor) -> str:
    """Returns dtype, device and shape of ``tensor`` in words, for messages."""
    return f"{tensor.dtype} on {tensor.device} of shape {tuple(tensor.shape)}"


def require_same(
    name: str, found: Tensor, dtype: torch.dtype, device: torch.device, shape: Sequence[int], built: str = Bucket.built
) -> None:
    """Raises ``RuntimeError`` where parameter ``name`` has another dtype, device or shape than when ``built``."""
    expected = f"{dtype} on {device} of shape {tuple(shape)}"
    if describe(found) != expected:
        raise RuntimeError(
            f"parameter {name!r} has become {describe(found)}; {built} for {expected}. "
            "Convert and shard the model (model.to(...), fully_shard(...)) before the optimizer's first step, or build "
            "it again"
        )


def require_private(name: str, param: Tensor) -> None:
    """Raises ``ValueError`` where parameter ``name``, which moves into a bucket, is in memory of several processes.

    GPU memory always counts as shared in torch, so only CPU memory is asked.
    """
    if param.device.type == "cpu" and param.is_shared():
        raise ValueError(
            f"parameter {name!r} is in shared memory (share_memory()), and it moves into a bucket here, so that other "
            "processes would not see it train. Processes that share one model (Hogwild) need torch.optim.ASGD; to "
            "train a copy, build the optimizer for a model that has not been shared"
        )


def require_dense(name: str, grad: Tensor) -> None:
    """Raises ``RuntimeError`` where the gradient of parameter ``name`` is sparse."""
    if grad.layout is not torch.strided:
        raise RuntimeError(f"parameter {name!r} has a sparse gradient; ASGD needs a dense one (sparse=False)")
