"""Replicated parameters: flat buckets, of which each rank owns and updates one shard (ZeRO-1 and ZeRO-2).

[Note: gradients] A bucket with ``reducing`` averages the ranks' own gradients. Its whole gradients live from backward
until its reduction starts; from then on ``p.grad`` is a ``GradientPiece`` that stands for this rank's piece of the
reduced gradient in ``Bucket.grad`` (1-D, indexed as the shard, in the dtype the rule is computed in). Without it (one
rank, or somebody else has reduced them) ``p.grad`` stays what it is in torch and is read where it lies.
"""

from __future__ import annotations

import bisect
import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dist_asgd.collectives import Collectives, Reduction, completes_within
from dist_asgd.layout import BucketLayout, Piece, plan_buckets
from dist_asgd.packing import Packer
from dist_asgd.pieces import GradientPiece, Placement, Reducing
from dist_asgd.rule import Hyperparameters
from dist_asgd.shards import GradientSlice, Precision, Run, Shard
from dist_asgd.update import as_real, block_size, compute_dtype

# Gradients of fewer elements are gathered before the update: one operator moves all of them, where reading each where
# it lies would cost several operators a parameter.
GATHER_BELOW = 32 * 1024

# ``GradientPiece.begun`` of a gradient that was dropped, and of one that only this rank knows yet: after every pass.
DROPPED, UNREDUCED = 2**62, 2**61


class Bucket:
    """One bucket of parameters with this rank's shard of it.

    Args:
        params: leaf tensors of one dtype and device, ``params[i]`` at ``layout.spans[i]``. They become views of the
            bucket's buffer, so that no collective copies anything in or out.
        names: of ``params``, for messages.
        collectives: None with one rank.
        reducing: given where gradients are the rank's own and the bucket averages them; then parameters start as rank
            0's, as in DistributedDataParallel.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        names: Sequence[str],
        layout: BucketLayout,
        rank: int,
        collectives: Collectives | None,
        precision: Precision,
        reducing: Reducing | None,
    ) -> None:
        self.params, self.names, self.layout = tuple(params), tuple(names), layout
        self.collectives = collectives if layout.numel else None
        self.group = None if collectives is None else collectives.group
        self.reducing = reducing
        self.positions = {id(param): position for position, param in enumerate(params)}
        self.dtype, self.device = params[0].dtype, params[0].device
        self.placements = tuple(Placement.of(param) for param in params)
        self.buffer = torch.zeros(layout.numel, dtype=self.dtype, device=self.device)  # 1-D, the parameters
        for position in range(len(params)):
            self._attach(position)
        self._addresses = [param.data_ptr() for param in self.params]
        if reducing is not None and self.collectives is not None:
            self.collectives.broadcast(as_real(self.buffer))
        start, stop = layout.shard(rank)
        self.shard = Shard(self.buffer[start:stop], layout, self.placements, rank, precision)
        self._owned = list(self.shard.pieces.values())
        self.grad: Tensor | None = None
        self.gradient_pieces = [GradientPiece(self, i, param) for i, param in enumerate(params)] if reducing else []
        self._reductions: deque[tuple[int, Reduction]] = deque()  # under way, in order, each with its pass
        self._gather: dist.Work | None = None
        self._packer = Packer(layout, self.placements, self.buffer)

    # Parameters ------------------------------------------------------------------------------------------------------

    def holds(self, position: int) -> bool:
        """Whether the parameter still is a view of the bucket."""
        return self.params[position].data_ptr() == self._addresses[position]

    def check_views(self) -> None:
        """Takes up parameters whose ``.data`` was replaced; raises ``RuntimeError`` where they do not fit any more."""
        if [param.data_ptr() for param in self.params] == self._addresses:
            return
        for position, param in enumerate(self.params):
            if self.holds(position):
                continue
            found = describe(param)
            expected = f"{self.dtype} on {self.device} of shape {self.placements[position].shape}"
            if found != expected:
                raise RuntimeError(
                    f"parameter {self.names[position]!r} has become {found}; the optimizer was built for {expected}. "
                    "Convert the model (model.to(...)) before building the optimizer, or build it again"
                )
            self._attach(position)

    def start_gather(self) -> None:
        """Starts completing the parameters on every rank from the shards, which have changed. Collective."""
        # The views do not share the buffer's version counter; with it, autograd refuses a backward through old values.
        torch.autograd.graph.increment_version(self.params)
        if self.collectives is not None:
            self._gather = self.collectives.start_gather(as_real(self.buffer), as_real(self.shard.param))

    def wait(self, seconds: float | None = None) -> None:
        """Waits until the parameters are complete, at most ``seconds``; a later call goes on where this one gave up."""
        if self._gather is None or not (seconds is None or completes_within(self._gather, seconds)):
            return
        self._gather.wait()
        self._gather = None

    def assemble(self, flat: Tensor) -> Tensor | None:
        """The whole bucket, 1-D, on rank 0's CPU (others: None) from a ``flat`` tensor of each shard. Collective."""
        if self.collectives is None:
            return flat.detach().clone().cpu()
        rank = dist.get_rank(self.group)
        parts = [torch.empty_like(flat) for _ in range(self.layout.world_size)] if rank == 0 else None
        real = None if parts is None else [as_real(part) for part in parts]
        dist.gather(as_real(flat), real, group=self.group, group_dst=0)
        return None if parts is None else torch.cat(parts).cpu()

    def _attach(self, position: int) -> None:
        param, span = self.params[position], self.layout.spans[position]
        view = self.placements[position].view(self.buffer[span.start : span.stop])
        view.copy_(param.detach())
        param.data = view

    # Gradients -------------------------------------------------------------------------------------------------------

    def requires_grad(self) -> list[bool]:
        return [param.requires_grad for param in self.params]

    def has_gradient(self) -> list[bool]:
        """For each parameter, whether this rank made a gradient since the last one was dropped."""
        grads = [param.grad for param in self.params]
        return [
            grad.contributed or grad.pending is not None if isinstance(grad, GradientPiece) else grad is not None
            for grad in grads
        ]

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
            source = self.buffer.new_empty(self.layout.numel)
            self._packer.pack(range(len(grads)), grads, 0, source)
            real = as_real(source)
            self._reductions.append((number, self.collectives.start_reduce(real, compute_dtype(real.dtype))))

    def reduces_within(self, seconds: float) -> bool:
        """Whether the oldest reduction under way is complete, at the latest after ``seconds``."""
        return not self._reductions or completes_within(self._reductions[0][1].work, seconds)

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
        """Every tensor that holds values of the gradients that are attached to their parameters, each value once."""
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

    # Update ----------------------------------------------------------------------------------------------------------

    def update(self, h: Hyperparameters, active: Sequence[bool] | None) -> None:
        """One step of this rank's shard for the parameters that are ``active`` (None: all)."""
        self.wait()
        self.finish_reduce()
        self.shard.update(h, active, self._reduced_slices if self.reducing else self._plain_slices)

    def _reduced_slices(self, run: Run) -> Iterator[GradientSlice]:
        where = self.shard.slice_of(run)
        if where.start < where.stop and self.grad is not None:
            yield GradientSlice(where.start, self.grad[where])

    def _plain_slices(self, run: Run) -> Iterator[GradientSlice]:
        """Large gradients where they lie, and runs of small ones gathered, in pieces that stay in cache."""
        small: list[Piece] = []
        most = block_size(self.layout.shard_numel, self.device)
        first = bisect.bisect_left(self._owned, run.first, key=lambda piece: piece.position)
        for piece in itertools.islice(self._owned, first, None):
            if piece.position >= run.stop:
                break
            grad = self.params[piece.position].grad
            if grad is None:
                continue
            numel = piece.stop - piece.start
            whole = numel == grad.numel()
            if whole and numel < GATHER_BELOW:
                small.append(piece)
                if piece.shard_stop - small[0].shard_start >= most:
                    yield self._gathered(small)
                    small = []
                continue
            if small:
                yield self._gathered(small)
                small = []
            flat = self._packer.flat(piece.position, grad)
            yield GradientSlice(piece.shard_start, flat if whole else flat[piece.start : piece.stop])
        if small:
            yield self._gathered(small)

    def _gathered(self, pieces: Sequence[Piece]) -> GradientSlice:
        start, stop = pieces[0].shard_start, pieces[-1].shard_stop
        out = self.buffer.new_empty(stop - start)
        positions = [piece.position for piece in pieces]
        grads = [self.params[position].grad for position in positions]
        self._packer.pack(positions, grads, self.shard.start + start, out)
        return GradientSlice(start, out)


def build_buckets(
    named: Mapping[Tensor, str],
    bucket_bytes: int,
    rank: int,
    world_size: int,
    group: dist.ProcessGroup | None,
    precision: Precision,
    reducing: Reducing | None,
) -> list[Bucket]:
    """Buckets for the parameters, with their names, of one group: apart by device and dtype. Collective."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for param in named:
        kinds.setdefault((param.device, param.dtype), []).append(param)
    buckets = []
    for (device, dtype), params in kinds.items():
        collectives = None if group is None else Collectives(group, device.type)
        numels = [param.numel() for param in params]
        for layout in plan_buckets(numels, world_size=world_size, max_numel=bucket_bytes // dtype.itemsize):
            of_bucket = [params[span.index] for span in layout.spans]
            names = [named[param] for param in of_bucket]
            buckets.append(Bucket(of_bucket, names, layout, rank, collectives, precision, reducing))
    return buckets


def describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} on {tensor.device} of shape {tuple(tensor.shape)}"
