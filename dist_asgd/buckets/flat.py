"""Replicated parameters: flat buckets, of which each rank owns and updates one shard (ZeRO-1 and ZeRO-2).

[Note: gradients] A bucket with ``reducing`` averages the ranks' own gradients. Its whole gradients live from backward
until its reduction starts; from then on ``p.grad`` is a ``GradientPiece`` that stands for this rank's piece of the
reduced gradient in ``Bucket.grad`` (1-D, indexed as the shard, in the dtype the rule is computed in). Without it (one
rank, or somebody else has reduced them) ``p.grad`` stays what it is in torch and is read where it lies.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dist_asgd.asgd.rounding import compute_dtype
from dist_asgd.asgd.schedule import Hyperparameters, Scaling
from dist_asgd.buckets.base import Bucket, Setting, describe, require_dense, require_fitting
from dist_asgd.buckets.gradient_tensors import GradientPiece
from dist_asgd.buckets.packing import Batches, Packer
from dist_asgd.comm.collectives import Collectives, Reduction, Transfer
from dist_asgd.kernels.dispatch import FlatSlice, PartsSlice, UpdateSlice
from dist_asgd.kernels.scan import LayoutScan, ParameterPlaces
from dist_asgd.kernels.tensor_list import Gradients, as_real
from dist_asgd.sharding.layout import BucketLayout, Span
from dist_asgd.sharding.placement import Placement
from dist_asgd.sharding.scalar_runs import Run
from dist_asgd.sharding.shard_views import FlatParameters

# ``GradientPiece.begun`` of a gradient that was dropped, and of one that only this rank knows yet: after every pass.
DROPPED, UNREDUCED = 2**62, 2**61


class ReplicatedBucket(Bucket):
    """Parameters that every rank has whole. They become views of one buffer, so no collective copies anything.

    Args:
        named: leaf tensors of one dtype and device.
        collectives: None with one rank.
        reduces: whether gradients are the rank's own, and the bucket averages them; then parameters start as rank 0's,
            as in DistributedDataParallel.
    """

    always_registered = True

    def __init__(
        self,
        named: Mapping[Tensor, str],
        layout: BucketLayout,
        setting: Setting,
        collectives: Collectives | None,
        reduces: bool,
    ) -> None:
        first = next(iter(named))
        placements = [Placement.of(param) for param in named]
        self.buffer = torch.zeros(layout.numel, dtype=first.dtype, device=first.device)  # 1-D, the parameters
        for param, placement, span in zip(named, placements, layout.spans, strict=True):
            self._attach(param, placement, span)
        if reduces and collectives is not None and layout.numel:
            collectives.broadcast(as_real(self.buffer))
        start, stop = layout.shard(setting.rank)
        parameters = FlatParameters(self.buffer[start:stop])
        super().__init__(named, layout, placements, parameters, setting.rank, collectives, setting)
        self.group, self.reduces = setting.group, reduces
        self.reducing = setting.reducing if reduces else None
        self.whole_gradients = not self.reduces
        self.meets = self.may_lag = collectives is not None
        if collectives is not None and not self.reduces:
            self.mirrors = range(collectives.world_size)
        self._places = ParameterPlaces.of(self.params)
        self._gradient_wire = setting.precision.gradient_wire(self.dtype)
        shapes, strides = [placement.shape for placement in placements], [placement.strides for placement in placements]
        self._look = LayoutScan.of(shapes, strides, self.buffer)
        self._plain: Gradients | None = None  # from when all were found until the step
        self._owned = list(self.shard.pieces.values())
        self.grad: Tensor | None = None
        self.gradient_pieces = [GradientPiece(self, i, param) for i, param in enumerate(self.params)] if reduces else []
        self._reductions: deque[tuple[int, Reduction]] = deque()  # under way, in order, each with its pass
        self._gather: Transfer | None = None
        self._received: Tensor | None = None  # by it, where parameters travel in another dtype
        self._packer = Packer(layout, self.placements, self.buffer)
        self._batches = Batches(self._owned, layout, self.device, parameters.own if self.shard.fuses else None)

    # Parameters ------------------------------------------------------------------------------------------------------

    def holds(self, position: int) -> bool:
        """Whether the parameter still is a view of the bucket."""
        return self.params[position].data_ptr() == self._places.addresses[position]

    def check_parameters(self) -> None:
        if self._places.are_current:
            return
        for position, (name, param) in enumerate(zip(self.names, self.params, strict=True)):
            if not self.holds(position):
                require_fitting(name, param, self.dtype, self.device, self.placements[position].shape)
                self._attach(param, self.placements[position], self.layout.spans[position])

    def start_gather(self, exact: bool = False) -> None:
        # The views do not share the buffer's version counter; with it, autograd refuses a backward through old values.
        torch.autograd.graph.increment_version(self.params)
        if self.collectives is None:
            return
        own, whole = self.shard.parameters.read(), self.buffer
        if self.wire != self.dtype and not exact:
            whole = self._received = torch.empty_like(self.buffer, dtype=self.wire)
            own = whole[self.shard.start : self.shard.stop].copy_(own)
        self._gather = self.collectives.start_gather(as_real(whole), as_real(own))

    def wait(self, seconds: float | None = None) -> None:
        if self._gather is None or not (seconds is None or self._gather.completes_within(seconds)):
            return
        self._gather.wait()
        if self._received is not None:
            with torch.no_grad():
                self.buffer.copy_(self._received)
        self._gather = self._received = None

    def _attach(self, param: Tensor, placement: Placement, span: Span) -> None:
        view = placement.view(self.buffer[span.start : span.stop])
        view.copy_(param.detach())
        param.data = view

    # Gradients -------------------------------------------------------------------------------------------------------

    def check_gradients(self) -> list[bool]:
        self._check_each_gradient()
        # A stand-in is none if this rank made no gradient since the last one was dropped.
        return [
            grad.contributed or grad.pending is not None if isinstance(grad, GradientPiece) else grad is not None
            for grad in [param.grad for param in self.params]
        ]

    def find_gradients(self) -> bool:
        self._plain = self._look.scan_gradients(self._places) if self.whole_gradients else None
        return self._plain is not None

    def let_go(self) -> None:
        self._plain = None

    def begun(self, passes: int) -> list[int]:
        """For each parameter, the pass that its gradient was begun in, or will be after ``passes``; -1 if frozen."""
        return [
            piece.begun
            if param.grad is piece and piece.begun != UNREDUCED
            else passes + 1
            if param.requires_grad
            else -1
            for param, piece in zip(self.params, self.gradient_pieces, strict=True)
        ]

    def has_unreduced(self) -> bool:
        """Whether a parameter has a gradient that only this rank knows."""
        grads = [param.grad for param in self.params]
        return any(grad.pending is not None if isinstance(grad, GradientPiece) else grad is not None for grad in grads)

    def fits(self, position: int, grad: Tensor) -> bool:
        """Whether ``grad`` can be the gradient of the parameter: dense, of its shape and on its device."""
        same = grad.shape == self.placements[position].shape and grad.device == self.device
        return same and grad.layout is torch.strided

    def _check_each_gradient(self) -> None:
        for position, (name, param) in enumerate(zip(self.names, self.params, strict=True)):
            grad = param.grad
            if isinstance(grad, GradientPiece):
                self._check_piece(name, position, grad)
                grad = grad.pending
            if grad is None or self.fits(position, grad):
                continue
            require_dense(name, grad)
            raise RuntimeError(
                f"the gradient of parameter {name!r} is {describe(grad)}, the optimizer was built for a parameter of "
                f"shape {self.placements[position].shape} on {self.device}: they must have the same shape and device"
            )

    def _check_piece(self, name: str, position: int, piece: GradientPiece) -> None:
        if not (self.gradient_pieces and piece is self.gradient_pieces[position]):
            raise RuntimeError(
                f"the gradient of parameter {name!r} was reduced by another ShardedASGD that has the parameter "
                "as well: use one of them, and drop gradients (zero_grad()) when you change over"
            )
        if piece.begun == DROPPED:
            raise RuntimeError(
                f"the gradient of parameter {name!r} was dropped by zero_grad() and then put back: it only "
                "stood for the reduced gradient, which is gone. Run another backward after zero_grad()"
            )

    def stand_in(self) -> None:
        """Puts stand-ins for gradients that only this rank knows: who looks at them (GradScaler) asks all ranks."""
        for position, (param, piece) in enumerate(zip(self.params, self.gradient_pieces, strict=True)):
            grad = param.grad
            if grad is not None and not isinstance(grad, GradientPiece) and self.fits(position, grad):
                piece.contributed, piece.begun, piece.pending = False, UNREDUCED, grad
                param.grad = piece

    def stand_down(self) -> None:
        """Takes those stand-ins away again."""
        for param, piece in zip(self.params, self.gradient_pieces, strict=True):
            if param.grad is piece and piece.begun == UNREDUCED:
                param.grad, piece.pending = piece.pending, None

    def start_reduce(self, number: int, with_gradients: bool = True) -> None:
        """Moves the rank's gradients into one buffer, frees them and starts their reduction. Collective.

        Args:
            number: of the pass.
            with_gradients: else this rank contributes zeros and keeps its gradients.
        """
        grads: list[Tensor | None] = []
        for position, (param, piece) in enumerate(zip(self.params, self.gradient_pieces, strict=True)):
            goes_on = param.grad is piece
            grad = piece.pending if goes_on else param.grad
            usable = param.dtype == self.dtype and self.fits(position, param if grad is None else grad)
            if not (with_gradients and usable):  # the checks before a step will name what is not usable
                grads.append(None)
                continue
            grads.append(grad)
            piece.pending = None
            if not goes_on or piece.begun == UNREDUCED:
                piece.contributed, piece.begun = False, number
            piece.contributed |= grad is not None
            if grad is not None or param.requires_grad:
                param.grad = piece
        if self.collectives is not None:
            source = torch.empty_like(self.buffer, dtype=self._gradient_wire)
            self._packer.pack(range(len(grads)), grads, 0, source)
            dtype = compute_dtype(self.dtype.to_real())
            self._reductions.append((number, self.collectives.start_reduce(as_real(source), dtype)))

    def reduces_within(self, seconds: float) -> bool:
        """Whether the oldest reduction under way is complete, at the latest after ``seconds``."""
        return not self._reductions or self._reductions[0][1].work.completes_within(seconds)

    def finish_oldest_reduce(self) -> None:
        """Waits for the oldest reduction under way, if any, and adds its result to the gradients that want it."""
        if not self._reductions:
            return
        number, reduction = self._reductions.popleft()
        total = reduction.finish()
        if self.dtype.is_complex:
            total = torch.view_as_complex(total.view(-1, 2))
        begun = [piece.begun for piece in self.gradient_pieces]
        if min(begun) == DROPPED:
            return
        if self.grad is None or min(begun) >= number:
            self.grad, old = total, None
        else:
            old = self.grad
        # A gradient that was begun later does not want this one; one that begins with it does not want what was there.
        for position, piece in self.shard.pieces.items():
            if begun[position] > number:
                total[piece.shard_start : piece.shard_stop].zero_()
            elif begun[position] == number and old is not None:
                old[piece.shard_start : piece.shard_stop].zero_()
        if old is not None:
            old.add_(total)

    def finish_reduce(self) -> None:
        while self._reductions:
            self.finish_oldest_reduce()

    def drop_gradient(self) -> None:
        """Frees the reduced gradient. Waits for nobody: what is under way is thrown away when it has come."""
        self.grad = None
        for piece in self.gradient_pieces:
            piece.contributed, piece.begun, piece.pending = False, DROPPED, None

    def zero_gradient(self, gradient: GradientPiece) -> None:
        """The same for one parameter, whose gradient then is zero. Waits for nobody either."""
        if gradient.begun != UNREDUCED:
            gradient.begun = (self.reducing.passes if self.reducing else 0) + 1
        gradient.pending = None if gradient.pending is None else torch.zeros_like(gradient.pending)
        piece = self.shard.pieces.get(gradient.position)
        if piece is not None and self.grad is not None:
            self.grad[piece.shard_start : piece.shard_stop].zero_()

    def gradient_tensors(self) -> list[Tensor]:
        """Of the gradients that are attached to their parameters: the whole ones, or the rank's own parts of them."""
        if not self.reduces:
            return [param.grad for param in self.params if param.grad is not None]
        self.finish_reduce()
        pairs = list(zip(self.params, self.gradient_pieces, strict=True))
        pending = [piece.pending for param, piece in pairs if param.grad is piece]
        attached = [param.grad is piece and piece.begun < UNREDUCED for param, piece in pairs]
        if self.grad is None:
            reduced = []
        elif all(attached):
            reduced = [self.grad]
        else:
            owned = [piece for position, piece in self.shard.pieces.items() if attached[position]]
            reduced = [self.grad[piece.shard_start : piece.shard_stop] for piece in owned]
        return reduced + [grad for grad in pending if grad is not None]

    def owned_gradients(self) -> list[Tensor]:
        if self.reduces:
            return self.gradient_tensors()
        grads = [(piece, self.params[piece.position].grad) for piece in self._owned]
        return [
            self._packer.flat(piece.position, grad)[piece.start : piece.stop]
            for piece, grad in grads
            if grad is not None
        ]

    # Update ----------------------------------------------------------------------------------------------------------

    def update(self, h: Hyperparameters, active: Sequence[bool] | None, scaling: Scaling | None = None) -> None:
        self.wait()
        if self.reduces:
            self.finish_reduce()
        self.shard.update(h, active, self._reduced_slices if self.reduces else self._plain_slices, scaling)
        self.let_go()

    def _reduced_slices(self, run: Run) -> Iterator[UpdateSlice]:
        where = self.shard.slice_of(run)
        if where.start < where.stop and self.grad is not None:
            yield FlatSlice(where.start, self.shard.parameters.read(where), self.grad[where])

    def _plain_slices(self, run: Run) -> Iterator[UpdateSlice]:
        """All where they lie, or large ones so and runs of small ones gathered, in pieces that stay in cache."""
        for batch in self._batches.of(run.first, run.stop):
            if batch.parts is not None and self._plain is not None:
                yield PartsSlice(batch.start, batch.stop, batch.parts, self._packer.chosen(batch, self._plain))
                continue
            grads = [grad for position in batch.positions if (grad := self.params[position].grad) is not None]
            if batch.parts is not None:
                yield PartsSlice(batch.start, batch.stop, batch.parts, self._packer.readable(batch, grads))
                continue
            param = self.shard.parameters.read(slice(batch.start, batch.stop))
            yield FlatSlice(batch.start, param, self._packer.join(batch, grads))
