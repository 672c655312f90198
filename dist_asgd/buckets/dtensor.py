"""Buckets of DTensors (FSDP2, HSDP, tensor parallelism) and of slices (FSDP1), which stay in their own memory.

FSDP and tensor parallelism have reduced the gradients. The update reads and writes local tensors. One kernel updates
all of them if it can (kernels/dispatch.py); otherwise small ones are gathered into a buffer and copied back. Either way
no operator runs on DTensors, whose dispatch in Python costs tens of microseconds a parameter in torch.optim.ASGD.

Where several ranks hold equal blocks of the parameters (see buckets/replicas.py), each owns a shard of the bucket and
updates the pieces of parameters in it. One all-gather among these ranks distributes the results.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_asgd._torch_private import local_tensor
from dist_asgd.asgd.schedule import Hyperparameters, Scaling
from dist_asgd.buckets.base import Bucket, BucketOptions, describe, require_dense
from dist_asgd.buckets.gradient_tensors import PlacedGradient
from dist_asgd.buckets.hooks import register_hook, remove_hooks
from dist_asgd.buckets.in_place import InPlaceBucket
from dist_asgd.buckets.local_tensors import gradient_is_placed, local_gradient, place_gradient
from dist_asgd.buckets.replicas import ReplicaGroup, mesh_layout_of
from dist_asgd.kernels.dispatch import FlatSlice, PartsSlice, UpdateSlice
from dist_asgd.kernels.scan import LayoutScan
from dist_asgd.kernels.tensor_list import Gradients
from dist_asgd.sharding.layout import BucketLayout
from dist_asgd.sharding.scalar_runs import Run


class PlacedBucket(InPlaceBucket, Bucket):
    """A bucket of parameters that are sharded already and keep their memory.

    Args:
        named: DTensors of one mesh layout (see buckets/replicas.py), or slices, of one dtype and device, with names.
        layout: the layout of one buffer of all blocks.
        options: the options that all buckets share.
        replica_group: the ranks that hold equal blocks of the parameters; None for slices.
        in_flight: buckets whose all-gather is under way, oldest first; shared by all buckets of a param group.
    """

    def __init__(
        self,
        named: Mapping[Tensor, str],
        layout: BucketLayout,
        options: BucketOptions,
        replica_group: ReplicaGroup | None,
        in_flight: deque[InPlaceBucket],
    ) -> None:
        super().__init__(named, layout, options, replica_group, in_flight)
        self.group, self.gradient_sync = options.group, options.gradient_sync
        self.compared_ranks = () if replica_group is None else replica_group.compared_ranks
        first = self.params[0]
        self._mesh_layout = mesh_layout_of(first) if isinstance(first, DTensor) else None
        shapes, strides = zip(*((placement.shape, placement.strides) for placement in self.placements), strict=True)
        self._scan = LayoutScan.of(shapes, strides, self._parameters.flats[0])
        self._scanned: Gradients | None = None  # between check_gradients() and update()
        self.always_gathers = self.agrees_before_step = self.collectives is not None
        hooked = self.params if self._needs_hooks(options.world_size) else ()
        hooks = [register_hook(param, self.gradient_ready, position) for position, param in enumerate(hooked)]
        weakref.finalize(self, remove_hooks, hooks)

    def _needs_hooks(self, world_size: int) -> bool:
        """Whether gradients can be partial, or GradScaler has to be told of infs on other meshes.

        Parameters in the memory of the host, whose mesh is of another device, are offloaded by FSDP2, which reduces
        their gradients itself. Where they have a hook, FSDP2 makes the host wait for each copy of a gradient.
        """
        if self._mesh_layout is None:
            return False
        mesh, _ = self._mesh_layout
        return mesh.device_type == self.device.type or mesh.size() < world_size

    # Gradients -------------------------------------------------------------------------------------------------------

    def check_gradients(self) -> list[bool]:
        self._scanned = self._found([param.grad for param in self.params])
        if self._scanned is not None:
            return [True] * len(self.params)
        self._check_each_gradient()
        # FSDP makes no gradient of a slice without elements, which takes every step.
        return [param.grad is not None or (self.presharded and not param.numel()) for param in self.params]

    def release_gradients(self) -> None:
        self._scanned = None

    def _found(self, grads: list[Any]) -> Gradients | None:
        """Returns all gradients if each exists with the layout and the placements of its parameter; otherwise None."""
        if self._mesh_layout is None:
            return None if any(grad is None for grad in grads) else self._scan.scan(grads)
        try:
            local = list(map(local_tensor, grads))
            places = [grad.placements for grad in grads]
            meshes = [grad.device_mesh for grad in grads]
        except AttributeError:  # None, or a plain tensor
            return None
        count = len(grads)
        placed = places.count(self._mesh_layout[1]) == count and meshes.count(self._mesh_layout[0]) == count
        return self._scan.scan(local) if placed else None

    def _check_each_gradient(self) -> None:
        for name, param, placement in zip(self.names, self.params, self.placements, strict=True):
            grad = param.grad
            if grad is None:
                continue
            if isinstance(param, DTensor):
                if not isinstance(grad, DTensor):
                    raise RuntimeError(
                        f"the gradient of parameter {name!r} is a plain {describe(grad)}, and the parameter is a "
                        f"DTensor with {param.placements}: make it one (distribute_tensor() for the whole gradient, "
                        "DTensor.from_local() for this rank's block)"
                    )
                if not gradient_is_placed(param):
                    if grad.device_mesh != param.device_mesh:
                        raise RuntimeError(
                            f"the gradient of parameter {name!r} is on {grad.device_mesh}, the parameter on "
                            f"{param.device_mesh}"
                        )
                    continue
                grad = local_gradient(param)
            if grad.shape != placement.shape or grad.device != self.device or grad.layout is not torch.strided:
                require_dense(name, grad)
                raise RuntimeError(
                    f"the gradient of parameter {name!r} is {describe(grad)} on this rank, the parameter has shape "
                    f"{placement.shape} on {self.device}: they must have the same shape and device"
                )

    def has_misplaced(self) -> list[bool]:
        """Returns for each parameter whether its gradient has other placements, as a partial gradient has."""
        placed = self._scanned is not None or self.presharded
        return [not (placed or gradient_is_placed(param)) for param in self.params]

    def place_gradients(self) -> None:
        """Redistributes gradients to the placements of their parameters. Collective where ``has_misplaced()``."""
        for param in [] if self._scanned is not None or self.presharded else self.params:
            place_gradient(param)

    def gradient_ready(self, position: int) -> None:
        """Hook: backward has accumulated the gradient of the parameter at ``position``.

        Reduces a partial gradient, such as the one of a norm under tensor parallelism. Collective then.
        """
        param = self.params[position]
        if self.gradient_sync.enabled:
            place_gradient(param)
        if isinstance(param.grad, DTensor):
            PlacedGradient.mark(param.grad, self)

    def gradient_tensors(self) -> list[Tensor]:
        return [local_gradient(param) for param in self.params if param.grad is not None]

    def owned_gradients(self) -> list[Tensor]:
        if not self.is_counted:
            return []
        grads = [(piece, self.params[piece.position]) for piece in self._parameters.pieces]
        return [
            self._packer.flat(piece.position, local_gradient(param))[piece.start : piece.stop]
            for piece, param in grads
            if param.grad is not None
        ]

    # Update ----------------------------------------------------------------------------------------------------------

    def update(self, h: Hyperparameters, active: Sequence[bool] | None, scaling: Scaling | None = None) -> None:
        self.wait()
        self.shard.update(h, active, self._slices, scaling)
        self.release_gradients()

    def _slices(self, run: Run) -> Iterator[UpdateSlice]:
        for batch in self._batches.of(run.first, run.stop):
            if batch.parts is not None and self._scanned is not None:
                yield PartsSlice(batch.start, batch.stop, batch.parts, self._packer.select(batch, self._scanned))
                continue
            grads: list[Any] = [self.params[position].grad for position in batch.positions]  # checked before the step
            if not self.presharded:
                grads = list(map(local_tensor, grads))
            if batch.parts is not None:
                yield PartsSlice(batch.start, batch.stop, batch.parts, self._packer.readable(batch, grads))
                continue
            flats = [self._parameters.flats[position] for position in batch.positions]
            param = self._packer.join(batch, flats, ready=True)
            yield FlatSlice(batch.start, param, self._packer.join(batch, grads))
            if batch.gathered:  # the caller has updated ``param`` before it asks for the next part
                self._packer.split(batch, param, flats)
