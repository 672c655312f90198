"""Buckets of replicated parameters, in flat buffers of which each rank owns and updates one shard (ZeRO-1, ZeRO-2).

[Note: gradients] A bucket with ``reduces`` averages the gradients of the ranks. A whole gradient lives from backward
until the bucket's reduction starts. From then on ``p.grad`` is a ``GradientPiece``, which stands for this rank's piece
of the averaged gradient in ``FlatBucket.grad``. In a bucket without ``reduces`` (one rank, or gradients averaged
by DistributedDataParallel) ``p.grad`` is a plain tensor, and the update reads it in its place.

ZeRO: Rajbhandari et al., 2020, https://arxiv.org/abs/1910.02054.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dist_asgd.asgd.rounding import compute_dtype
from dist_asgd.asgd.schedule import Hyperparameters, Scaling
from dist_asgd.buckets.base import Bucket, BucketOptions, describe, require_dense, require_same
from dist_asgd.buckets.gradient_tensors import DROPPED, UNREDUCED, GradientPiece
from dist_asgd.buckets.packing import Batches, Packer
from dist_asgd.comm.collectives import Collectives, Reduction, Transfer
from dist_asgd.comm.streams import Completion, used_by_current_stream
from dist_asgd.kernels.dispatch import FlatSlice, PartsSlice, UpdateSlice
from dist_asgd.kernels.packing import FusedPacking, fused_packing
from dist_asgd.kernels.scan import LayoutScan, ParameterPlaces
from dist_asgd.kernels.tensor_list import Gradients, TensorList, as_real
from dist_asgd.sharding.layout import BucketLayout, Span
from dist_asgd.sharding.placement import Placement
from dist_asgd.sharding.scalar_runs import Run
from dist_asgd.sharding.shard_views import FlatParameters

# References to an object in a list that nothing else refers to, as `enumerate(map(sys.getrefcount, list))` counts them.
_UNHELD = next(map(sys.getrefcount, [object()]))


class FlatBucket(Bucket):
    """A bucket of parameters that every rank holds whole. They lie in one buffer, the input of collectives.

    Each has a storage of its own over its part of the buffer's memory, and keeps that memory alive.

    Args:
        named: leaf tensors of one dtype and device, with their names.
        layout: the layout of the bucket.
        options: the options that all buckets share.
        collectives: among the ranks of the optimizer; None with one rank.
        reduces: whether the bucket averages gradients over ranks. If so, construction is collective and copies rank 0's
            parameters to all ranks, as DistributedDataParallel does.

    Attributes:
        buffer: the parameters.
        grad: this rank's shard of the averaged gradients; None if there are none.
        gradient_pieces: the ``p.grad`` of each parameter after its reduction; empty without ``reduces``.
    """

    always_registered = True

    def __init__(
        self,
        named: Mapping[Tensor, str],
        layout: BucketLayout,
        options: BucketOptions,
        collectives: Collectives | None,
        reduces: bool,
    ) -> None:
        first = next(iter(named))
        placements = [Placement.of(param) for param in named]
        self.buffer = torch.zeros(layout.numel, dtype=first.dtype, device=first.device)  # 1-D
        # All at once, so that they lie side by side: every step looks at each parameter's.
        storages = list(map(self._storage_of, layout.spans))
        for param, placement, storage in zip(named, placements, storages, strict=True):
            self._attach(param, placement, storage)
        if reduces and collectives is not None and layout.numel:
            collectives.broadcast(as_real(self.buffer))
        start, stop = layout.shard(options.rank)
        parameters = FlatParameters(self.buffer[start:stop])
        super().__init__(named, layout, placements, parameters, options.rank, collectives, options)
        self.group, self.reduces = options.group, reduces
        self.gradient_sync = options.gradient_sync if reduces else None
        self.whole_gradients = not self.reduces
        self.agrees_before_step = self.may_gather_late = collectives is not None
        if collectives is not None:
            self.copy_ranks = range(collectives.world_size)
            self.compared_ranks = () if self.reduces else self.copy_ranks
        self._places = ParameterPlaces.of(self.params)
        self._gradient_wire = options.precision.gradient_wire(self.dtype)
        shapes, strides = [placement.shape for placement in placements], [placement.strides for placement in placements]
        self._scan = LayoutScan.of(shapes, strides, self.buffer)
        self._scanned: Gradients | None = None  # between find_gradients() and update()
        self._owned = list(self.shard.pieces.values())
        self._prepare_reductions()
        self._gather: Transfer | None = None
        self._complete = Completion()  # of the last all-gather
        self._received: Tensor | None = None  # 1-D, wire dtype: the result of _gather, if it is not the buffer
        self._packer = Packer(layout, self.placements, self.buffer)
        self._batches = Batches(self._owned, layout, self.device, parameters.view_of if self.shard.forms.fuse else None)

    def _prepare_reductions(self) -> None:
        self.grad: Tensor | None = None  # 1-D, indexed as the shard, compute dtype
        self.absent = self.buffer.new_full((), math.nan)
        self.gradient_pieces = [
            self._new_piece(position) for position in range(len(self.params) if self.reduces else 0)
        ]
        self._reductions: deque[tuple[int, Reduction]] = deque()  # under way, oldest first, each with its pass
        self._changes: deque[tuple[int, Callable[[], None]]] = deque()  # each waits for that many reductions
        self._begun = self._done = 0  # how many reductions were started, and how many are complete
        self.changes: list[str] = []  # what the user has done to gradients since the last step
        self._convert: FusedPacking | None = None  # what packs gradients that are sent in another dtype, by one kernel
        if self.reduces and self.collectives is not None:
            self._convert = fused_packing(self.device, self.dtype, self._gradient_wire)
        if self._convert is not None:
            spans = self.layout.spans
            views = [self.buffer[span.start : span.stop] for span in spans]
            self._all_parts = TensorList.of(views, [span.start for span in spans])

    # Parameters ------------------------------------------------------------------------------------------------------

    def holds(self, position: int) -> bool:
        """Whether the parameter at ``position`` still lies in the buffer."""
        return self.params[position].data_ptr() == self._places.addresses[position]

    def check_parameters(self, *, leaves_shared: bool = False) -> None:
        if self._places.are_current:
            return
        for position, (name, param) in enumerate(zip(self.names, self.params, strict=True)):
            if not self.holds(position):
                require_same(name, param, self.dtype, self.device, self.placements[position].shape)
                if param.data_ptr() == self.absent.data_ptr():
                    raise RuntimeError(
                        f"parameter {name!r} was set to what was computed from p.grad, of which each rank has a piece "
                        "only: use step(), or whole gradients (no_sync())"
                    )
                if not leaves_shared:
                    _refuse_shared_memory(name, param)
                self._attach(param, self.placements[position], self._storage_of(self.layout.spans[position]))
                self._known_writes -= 1  # the new memory may have other values

    def value_tensors(self) -> list[Tensor]:
        return [self.buffer]

    def start_gather(self, exact: bool = False) -> None:
        self._count_own_write()
        if self.collectives is None:
            return
        own, whole = self.shard.parameters.read(), self.buffer
        if self.wire != self.dtype and not exact:
            whole = self._received = torch.empty_like(self.buffer, dtype=self.wire)
            own = whole[self.shard.start : self.shard.stop].copy_(own)
        self._gather = self.collectives.start_gather(as_real(whole), as_real(own))

    def wait(self, seconds: float | None = None) -> None:
        if self._gather is None:
            self._complete.wait()
            return
        if not (seconds is None or self._gather.completes_within(seconds)):
            return
        self._gather.wait()
        if self._received is not None:
            with torch.no_grad():
                self.buffer.copy_(self._received)
            used_by_current_stream(self._received)
        self._complete.record(self.device)
        self._gather = self._received = None

    def _storage_of(self, span: Span) -> torch.UntypedStorage:
        """Returns a storage over the memory of ``span``, which it keeps alive.

        Parameters need storages of their own: whoever saves or compares by storage (torch.save, safetensors,
        Accelerate) would take views of the buffer for one tensor.
        """
        itemsize = self.buffer.itemsize
        return self.buffer.untyped_storage()[span.start * itemsize : span.stop * itemsize]

    def _attach(self, param: Tensor, placement: Placement, storage: torch.UntypedStorage) -> None:
        own = torch.empty(0, dtype=self.buffer.dtype, device=self.buffer.device)
        own.set_(storage, 0, placement.shape, placement.strides)
        own.copy_(param.detach())
        param.data = own

    # Gradients -------------------------------------------------------------------------------------------------------

    def check_gradients(self) -> list[bool]:
        self._check_each_gradient()
        # A GradientPiece may hold gradients of other ranks only.
        return [
            grad.contributed or grad.pending is not None if isinstance(grad, GradientPiece) else grad is not None
            for grad in [param.grad for param in self.params]
        ]

    def find_gradients(self) -> bool:
        self._scanned = self._scan.scan_gradients(self._places) if self.whole_gradients else None
        return self._scanned is not None

    def release_gradients(self) -> None:
        self._scanned = None

    def first_passes(self, passes: int) -> list[int]:
        """Returns for each parameter the first pass that its gradient holds, or will hold if ``passes`` have begun.

        -1 for a frozen parameter without a gradient.
        """
        return [
            piece.first_pass
            if param.grad is piece and piece.first_pass != UNREDUCED
            else passes + 1
            if param.requires_grad
            else -1
            for param, piece in zip(self.params, self.gradient_pieces, strict=True)
        ]

    def has_unreduced(self) -> bool:
        """Whether a parameter has a gradient on this rank that is not reduced."""
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
                grad = self._take_up(position, grad)
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
                f"the gradient of parameter {name!r} was made of one that was dropped, or was reduced by another "
                "ShardedASGD that has the parameter as well: use one of them, and drop gradients (zero_grad()) when "
                "you change over"
            )
        if piece.first_pass == DROPPED:
            raise RuntimeError(
                f"the gradient of parameter {name!r} was dropped by zero_grad() and then put back: it only "
                "stood for the reduced gradient, which is gone. Run another backward after zero_grad()"
            )

    def attach_placeholders(self) -> None:
        """Replaces gradients that are not reduced by pieces that hold them, so that GradScaler asks all ranks."""
        for position, (param, piece) in enumerate(zip(self.params, self.gradient_pieces, strict=True)):
            grad = param.grad
            if grad is not None and not isinstance(grad, GradientPiece) and self.fits(position, grad):
                piece.contributed, piece.first_pass, piece.pending = False, UNREDUCED, grad
                param.grad = piece

    def detach_placeholders(self) -> None:
        """Undoes ``attach_placeholders()``: gradients that are not reduced are plain tensors again."""
        for param, piece in zip(self.params, self.gradient_pieces, strict=True):
            if param.grad is piece and piece.first_pass == UNREDUCED:
                param.grad, piece.pending = piece.pending, None

    def _new_piece(self, position: int) -> GradientPiece:
        # Pieces have their parameters' strides, as autograd wants of gradients, and versions of their own.
        param, memory = self.params[position], self.buffer.new_empty(0)
        memory.set_(param.untyped_storage(), param.storage_offset(), param.size(), param.stride())
        return GradientPiece(self, position, memory)

    def _leave_dropped_pieces(self) -> None:
        """Leaves pieces that were dropped to whoever still holds them, as the next gradient is not theirs."""
        pieces = self.gradient_pieces
        for position, references in enumerate(map(sys.getrefcount, pieces)):
            held = references > _UNHELD and self.params[position].grad is not pieces[position]
            if held and self.holds(position):
                pieces[position].first_pass, pieces[position].pending = DROPPED, None
                pieces[position] = self._new_piece(position)

    def start_reduce(self, number: int, with_gradients: bool = True) -> None:
        """Moves this rank's gradients into one buffer, frees them and starts their reduction. Collective.

        Args:
            number: the number of the pass.
            with_gradients: False to contribute zeros and keep this rank's gradients.
        """
        self._leave_dropped_pieces()
        grads: list[Tensor | None] = []
        for position, (param, piece) in enumerate(zip(self.params, self.gradient_pieces, strict=True)):
            if type(param.grad) is GradientPiece and param.grad is not piece:
                self._take_up(position, param.grad)
            goes_on = param.grad is piece
            grad = piece.pending if goes_on else param.grad
            usable = param.dtype == self.dtype and self.fits(position, param if grad is None else grad)
            if not (with_gradients and usable):  # the checks before the step name an unusable gradient
                grads.append(None)
                continue
            grads.append(grad)
            piece.pending = None
            if not goes_on or piece.first_pass == UNREDUCED:
                piece.contributed, piece.first_pass, piece.is_read = False, number, False
            piece.contributed |= grad is not None
            if grad is not None or param.requires_grad:
                param.grad = piece
        if self.collectives is not None:
            source = torch.empty_like(self.buffer, dtype=self._gradient_wire)
            if self._convert is None:
                self._packer.pack(range(len(grads)), grads, 0, source)
            else:
                self._packer.convert(grads, source, self._convert, self._all_parts)
            dtype = compute_dtype(self.dtype.to_real())
            self._reductions.append((number, self.collectives.start_reduce(as_real(source), dtype)))
            self._begun += 1

    @property
    def waits_on_host(self) -> bool:
        """Whether ``finish_oldest_reduce()`` blocks the host; otherwise the current stream of the device waits."""
        return self.collectives is None or self.collectives.waits_on_host

    def reduces_within(self, seconds: float) -> bool:
        """Waits for the oldest reduction under way, at most ``seconds``, and returns whether it is complete."""
        return not self._reductions or self._reductions[0][1].work.completes_within(seconds)

    def finish_oldest_reduce(self) -> None:
        """Waits for the oldest reduction under way, if any, and adds its result to the gradients that hold its pass."""
        if not self._reductions:
            return
        self._add_result(*self._reductions.popleft())
        self._done += 1
        while self._changes and self._changes[0][0] <= self._done:
            self._changes.popleft()[1]()

    def _add_result(self, number: int, reduction: Reduction) -> None:
        total = reduction.finish()
        if self.dtype.is_complex:
            total = torch.view_as_complex(total.view(-1, 2))
        begun = [piece.first_pass for piece in self.gradient_pieces]
        if min(begun) == DROPPED:
            return
        if self.grad is None or min(begun) >= number:
            self.grad, old = total, None
        else:
            old = self.grad
        # A gradient with a later first pass excludes this result. One with this first pass excludes the older values.
        for position, piece in self.shard.pieces.items():
            if begun[position] > number:
                total[piece.shard_start : piece.shard_stop].zero_()
            elif begun[position] == number and old is not None:
                old[piece.shard_start : piece.shard_stop].zero_()
        if old is not None:
            old.add_(total)

    def finish_reduce(self) -> None:
        """Waits for all reductions under way and adds their results."""
        while self._reductions:
            self.finish_oldest_reduce()

    def drop_gradient(self) -> None:
        """Frees the averaged gradients without waiting; results of reductions under way are discarded."""
        self.grad = None
        self.changes.clear()
        for piece in self.gradient_pieces:
            piece.contributed, piece.first_pass, piece.pending = False, DROPPED, None

    def zero_gradient(self, gradient: GradientPiece) -> None:
        """Sets one gradient to zero without waiting; results of reductions under way are discarded for it."""
        if gradient is not self.gradient_pieces[gradient.position]:  # it was dropped
            return
        if gradient.is_read:
            self.note_change(gradient.position, "zero_()")
            self.in_order(gradient, lambda: gradient.part.zero_())
        elif gradient.first_pass != UNREDUCED:
            gradient.first_pass = (self.gradient_sync.passes if self.gradient_sync else 0) + 1
        gradient.pending = None if gradient.pending is None else torch.zeros_like(gradient.pending)
        piece = self.shard.pieces.get(gradient.position)
        if piece is not None and self.grad is not None and not gradient.is_read:
            self.grad[piece.shard_start : piece.shard_stop].zero_()

    # What operators on gradients ask for (``buckets/piece_operators.py``) ---------------------------------------------

    @property
    def part_dtype(self) -> torch.dtype:
        return compute_dtype(self.dtype)

    def part(self, position: int) -> Tensor | None:
        if self.grad is None:
            return None
        piece = self.shard.pieces.get(position)
        return self.grad[:0] if piece is None else self.grad[piece.shard_start : piece.shard_stop]

    def part_of(self, position: int, whole: Tensor) -> Tensor:
        piece, flat = self.shard.pieces.get(position), self._packer.flat(position, whole)
        return flat[:0] if piece is None else flat[piece.start : piece.stop]

    def in_order(self, gradient: GradientPiece, change: Callable[[], object]) -> None:
        piece, begun = self.gradient_pieces[gradient.position], gradient.first_pass
        piece.is_read = True

        def unless_dropped() -> None:
            if piece.first_pass == begun and self.grad is not None:
                change()

        if self._reductions:
            self._changes.append((self._begun, unless_dropped))
        else:
            unless_dropped()

    def note_change(self, position: int, change: str) -> None:
        self.changes.append(f"{change} on {self.names[position]!r}")

    def _take_up(self, position: int, grad: GradientPiece) -> GradientPiece:
        """Makes the values of ``grad``, which an operator made and the user assigned, those of the bucket's gradient.

        Returns the ``p.grad`` of the parameter from now on: ``grad`` itself where it is no such gradient.
        """
        piece = self.gradient_pieces[position] if self.gradient_pieces else grad
        if (
            not grad.is_made
            or grad.owner is not self
            or grad.position != position
            or self.params[position].grad is not grad
        ):
            return grad
        if grad.first_pass != piece.first_pass:
            return grad

        def take_up() -> None:
            part = self.part(position)
            if part is not None and grad.made_values is not None:
                part.copy_(grad.made_values)

        self.note_change(position, grad.made_by)
        self.in_order(piece, take_up)
        piece.pending, piece.contributed = grad.pending, grad.contributed
        self.params[position].grad = piece
        return piece

    def gradient_tensors(self) -> list[Tensor]:
        """Returns the gradients that are attached to parameters: whole, or with ``reduces`` this rank's shard of them.

        Waits for reductions under way.
        """
        if not self.reduces:
            return [param.grad for param in self.params if param.grad is not None]
        for position, param in enumerate(self.params):
            if isinstance(param.grad, GradientPiece):
                self._take_up(position, param.grad)
        self.finish_reduce()
        pairs = list(zip(self.params, self.gradient_pieces, strict=True))
        pending = [piece.pending for param, piece in pairs if param.grad is piece]
        attached = [param.grad is piece and piece.first_pass < UNREDUCED for param, piece in pairs]
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
            self.changes.clear()
        self.shard.update(h, active, self._reduced_slices if self.reduces else self._plain_slices, scaling)
        self.release_gradients()

    def _reduced_slices(self, run: Run) -> Iterator[UpdateSlice]:
        where = self.shard.slice_of(run)
        if where.start < where.stop and self.grad is not None:
            yield FlatSlice(where.start, self.shard.parameters.read(where), self.grad[where])

    def _plain_slices(self, run: Run) -> Iterator[UpdateSlice]:
        """Yields the parts of the shard that ``run`` covers, with gradients: in place, or small ones gathered."""
        for batch in self._batches.of(run.first, run.stop):
            if batch.parts is not None and self._scanned is not None:
                yield PartsSlice(batch.start, batch.stop, batch.parts, self._packer.select(batch, self._scanned))
                continue
            grads = [grad for position in batch.positions if (grad := self.params[position].grad) is not None]
            if batch.parts is not None:
                yield PartsSlice(batch.start, batch.stop, batch.parts, self._packer.readable(batch, grads))
                continue
            param = self.shard.parameters.read(slice(batch.start, batch.stop))
            yield FlatSlice(batch.start, param, self._packer.join(batch, grads))


def _refuse_shared_memory(name: str, param: Tensor) -> None:
    """Raises ``RuntimeError`` for a parameter in shared memory, which the bucket would take it out of."""
    if param.device.type == "cpu" and param.is_shared():
        raise RuntimeError(
            f"parameter {name!r} was moved to shared memory (share_memory(), or the model was sent to another process) "
            "after the optimizer was built: a step would change it in this process only. Share or send a copy "
            "(copy.deepcopy(model)), and set p.data = p.data.clone() to go on with this one"
        )
