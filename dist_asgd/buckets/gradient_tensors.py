"""Tensors that stand as ``p.grad`` where gradients are in parts on several ranks, and their unscaling."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_asgd._torch_private import (
    FOREACH_ZERO_,
    amp_unscale_,
    aten,
    current_graph_task_id,
    local_tensor,
)
from dist_asgd.buckets import piece_operators
from dist_asgd.sharding.no_memory import name_of, needs_memory

# Values of ``GradientPiece.first_pass`` above every number of a pass: for a gradient that was dropped, and for one that
# no pass has reduced yet.
DROPPED, UNREDUCED = 2**62, 2**61


class GradientSync(Protocol):
    """The optimizer as its gradients see it; ``step/sync.py`` implements it.

    Attributes:
        passes: number of reduction passes that this rank has begun (see buckets/reducer.py).
        enabled: whether backward reduces gradients; False inside ``no_sync()``.
    """

    @property
    def passes(self) -> int: ...
    @property
    def enabled(self) -> bool: ...
    def agree_on(self, operation: str) -> None:
        """Finishes the reductions of all ranks before ``operation``, a call of the user. Collective."""

    def together(self, operation: str) -> contextlib.AbstractContextManager[object]:
        """Does what ``agree_on`` does after a block; an error that it raises on one rank is raised on all."""

    def warn_reduced_twice(self) -> None:
        """Warns that DistributedDataParallel reduces gradients as well."""


class GradientOwner(Protocol):
    """The bucket of a parameter as the parameter's gradient sees it."""

    group: dist.ProcessGroup | None  # the ranks of the optimizer; None for one rank

    @property
    def gradient_sync(self) -> GradientSync | None: ...
    def gradient_tensors(self) -> list[Tensor]: ...


class PieceOwner(GradientOwner, Protocol):
    """The bucket of a parameter as a ``GradientPiece`` sees it."""

    @property
    def names(self) -> tuple[str, ...]: ...

    gradient_pieces: list[GradientPiece]
    absent: Tensor  # 0-dim, NaN: the memory of gradients that operators make

    @property
    def part_dtype(self) -> torch.dtype:
        """The dtype of the averaged gradients."""

    def zero_gradient(self, gradient: GradientPiece) -> None:
        """Sets one gradient to zero. No communication."""

    def part(self, position: int) -> Tensor | None:
        """Returns this rank's part of an averaged gradient, 1-D, maybe empty; None where the gradient was dropped."""

    def part_of(self, position: int, whole: Tensor) -> Tensor:
        """Returns this rank's part of ``whole``, a tensor of the shape of the parameter, 1-D."""

    def in_order(self, gradient: GradientPiece, change: Callable[[], object]) -> None:
        """Calls ``change`` when the reductions of the gradient that are under way are complete. No communication."""

    def note_change(self, position: int, change: str) -> None:
        """Notes how the user has changed a gradient, which must be the same on every rank. No communication."""

    def finish_reduce(self) -> None:
        """Waits for the reductions under way."""


class GradientPiece(Tensor):
    """The ``p.grad`` of a parameter whose gradient was reduced over ranks: stands for the piece that this rank owns.

    The values are in the ``grad`` of ``owner``, the bucket. The tensor has the parameter's shape and dtype, and no
    memory for values. It supports accumulation by another backward, zeroing, and ``GradScaler.unscale_``, which every
    rank must call and in which every rank sees an inf of any rank. Setting ``p.grad`` to None drops it.

    Elementwise operators act on the pieces, without communication; every rank must call them alike. Those that return a
    tensor return another ``GradientPiece``, with values of its own, which may be assigned to ``p.grad``. ``norm``,
    ``sum``, ``max``, ``min``, ``all`` and ``any`` of all elements are collective, and return plain tensors that are
    equal on every rank. Other operators need the whole gradient and raise ``RuntimeError``.

    Attributes:
        position: position of the parameter in its bucket.
        contributed: whether this rank had a gradient in any of the reductions that the piece has accumulated.
        first_pass: number of the first reduction pass (see buckets/reducer.py) that the piece holds; above all passes
            for a piece that was dropped, or that holds no reduced gradient yet.
        pending: a gradient of this rank that is not reduced yet; None if there is none.
        made_values: this rank's part of what an operator made, 1-D; None in the gradient that the bucket holds.
        made_dtype: the dtype that ``made_values`` have or will have; None in the gradient that the bucket holds.
        is_made: whether an operator made the piece.
        made_by: the operators that made the piece, with their numbers, in words.
        is_read: whether an operator was called on the gradient, so that changes have to keep their order.
    """

    _owner: weakref.ref[PieceOwner]
    position: int
    contributed: bool
    first_pass: int
    pending: Tensor | None  # shape of the parameter

    made_values: Tensor | None
    made_dtype: torch.dtype | None
    is_made: bool
    made_by: str
    is_read: bool

    @staticmethod
    def __new__(cls, owner: PieceOwner, position: int, memory: Tensor) -> GradientPiece:
        # No operator reads the memory. Without any, p.data = p.grad would end the process.
        piece = memory.as_subclass(cls)
        piece.position = position
        # The reference is weak, so that a gradient that outlives its optimizer does not keep the optimizer's memory.
        piece._owner, piece.contributed, piece.first_pass, piece.pending = weakref.ref(owner), False, 0, None
        piece.made_values, piece.is_made, piece.made_by, piece.is_read = None, False, "", False
        piece.made_dtype = None
        return piece

    @classmethod
    def made_from(cls, source: GradientPiece, dtype: torch.dtype, made_dtype: torch.dtype) -> GradientPiece:
        """Returns a piece of ``dtype`` for the result of an operator on ``source``, without values yet."""
        made = cls(source.owner, source.position, source.owner.absent.to(dtype).expand(source.shape))
        made.contributed, made.first_pass, made.is_made = source.contributed, source.first_pass, True
        made.made_dtype = made_dtype
        return made

    @property
    def holds_unreduced_only(self) -> bool:
        """Whether the piece stands for a gradient of this rank alone."""
        return self.first_pass == UNREDUCED

    @property
    def part(self) -> Tensor:
        """This rank's part of the values, 1-D."""
        part = self.made_values if self.is_made else self.owner.part(self.position)
        if part is None or self.first_pass == DROPPED:
            raise _dropped()
        return part

    def require_alive(self) -> None:
        """Raises ``RuntimeError`` where the gradient was dropped, or the one that it was made of."""
        if self.first_pass == DROPPED or self.first_pass != self.owner.gradient_pieces[self.position].first_pass:
            raise _dropped()

    def no_values(self) -> Tensor:
        """Returns an empty tensor of the dtype of the values, 1-D."""
        dtype = self.owner.part_dtype if self.made_dtype is None else self.made_dtype
        return torch.empty(0, dtype=dtype, device=self.device)

    def has_dtype(self, values: Tensor) -> bool:
        """Whether the values of the piece have the dtype of ``values``."""
        return self.no_values().dtype == values.dtype

    @property
    def owner(self) -> PieceOwner:
        owner = self._owner()
        if owner is None:
            raise RuntimeError("this gradient belongs to an optimizer that is gone: set p.grad = None")
        return owner

    def __repr__(self) -> str:  # type: ignore[override]
        return f"GradientPiece(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __copy__(self) -> GradientPiece:
        return self  # as detach()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise _needs_whole("pickling")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # __torch_dispatch__ would be too late: a DTensor in one list with the piece might get there first.
        if func is amp_unscale_:
            return unscale_(*args)
        if func is Tensor.untyped_storage:  # compiled autograd asks how large it is
            return torch.UntypedStorage(args[0].numel() * args[0].element_size(), device="meta")
        if needs_memory(func, args):
            raise _needs_whole(name_of(func))
        with torch.DisableTorchFunctionSubclass():  # else torch makes every result an instance of this class
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        in_backward = current_graph_task_id() != -1
        if in_backward and func in (aten.add_.Tensor, aten.add.Tensor) and isinstance(args[0], GradientPiece):
            piece, grad = args
            if piece.pending is None:
                piece.pending = grad.detach().clone()  # the engine may pass one tensor to several parameters
            elif piece.pending.layout is torch.strided:  # a sparse one stays, for the check before the step
                piece.pending = piece.pending + grad.detach()
            return piece
        made = isinstance(args[0], GradientPiece) and args[0].is_made
        if func in (aten.zero_.default, FOREACH_ZERO_) and not made:
            several = isinstance(args[0], (list, tuple))
            for grad in args[0] if several else [args[0]]:
                if isinstance(grad, GradientPiece) and not grad.is_made:
                    grad.owner.zero_gradient(grad)
                else:
                    grad.zero_()
            return None if several else args[0]
        if func is aten.detach.default:
            return args[0]
        if in_backward and func is aten.copy_.default and isinstance(args[0], GradientPiece):
            # DistributedDataParallel writes the mean that it has computed, which equals the values of the piece.
            if args[0].owner.gradient_sync is not None:
                args[0].owner.gradient_sync.warn_reduced_twice()
            return args[0]
        if in_backward:
            raise RuntimeError(
                "DistributedDataParallel, or another hook of backward, reads a gradient that gradients='local' has "
                f"reduced already ({func}). Under DistributedDataParallel, also where Accelerate or a Trainer wraps "
                "the model, pass gradients='reduced' to ShardedASGD"
            )
        result = piece_operators.apply(cls, func, args, kwargs or {})
        if result is NotImplemented:
            raise _needs_whole(func)
        return result


def _dropped() -> RuntimeError:
    return RuntimeError(
        "this gradient, or the one that it was made of, was dropped by zero_grad(): run another backward"
    )


def _needs_whole(func: Any) -> RuntimeError:
    return RuntimeError(
        f"{func} needs a whole gradient, and gradients='local' leaves each rank a piece of the reduced one. "
        "Elementwise operators and norms of all elements work, and the optimizer's clip_grad_norm_() clips by norm. "
        "Whatever else reads gradients needs them whole: inside no_sync(), or under DistributedDataParallel with "
        "gradients='reduced'. Drop them (zero_grad()) before you convert the model"
    )


class PlacedGradient(DTensor):
    """The ``p.grad`` of a DTensor after backward: a DTensor whose unscaling by GradScaler sees infs of all ranks.

    torch's unscaling reduces infs over the mesh of the first gradient only, and takes no plain tensors beside DTensors.
    Ranks of another mesh would take a step that the first mesh skips.
    """

    _owner: weakref.ref[GradientOwner]

    @classmethod
    def mark(cls, grad: DTensor, owner: GradientOwner) -> None:
        """Changes the class of ``grad``, which autograd has stored already, and sets its owner."""
        if type(grad) is DTensor:
            grad.__class__ = cls
            grad._owner = weakref.ref(owner)  # type: ignore[attr-defined]

    @property
    def owner(self) -> GradientOwner | None:
        return self._owner()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is amp_unscale_:
            return unscale_(*args)
        with torch.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().__reduce_ex__(protocol)  # a plain DTensor

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copy = self.detach().clone()
        memo[id(self)] = copy
        return copy


def unscale_(grads: Sequence[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    """Multiplies gradients by ``inv_scale``, and sets ``found_inf`` to 1 if any rank has a non-finite value.

    Called in place of the operator behind ``GradScaler.unscale_``. Collective where a gradient is a ``GradientPiece``
    or a ``PlacedGradient``.

    Args:
        grads: the gradients of one device and dtype.
        found_inf: 1 element, fp32.
        inv_scale: 1 element, fp32.
    """
    found = [grad.owner for grad in grads if isinstance(grad, (GradientPiece, PlacedGradient))]
    owners = list(dict.fromkeys(owner for owner in found if owner is not None))
    for gradient_sync in {id(owner.gradient_sync): owner.gradient_sync for owner in owners}.values():
        if gradient_sync is not None:
            gradient_sync.agree_on("GradScaler.unscale_()")
    pieces = list(dict.fromkeys(grad.owner for grad in grads if isinstance(grad, GradientPiece)))
    local = [tensor for owner in pieces for tensor in owner.gradient_tensors()]
    for grad in grads:
        if not isinstance(grad, GradientPiece):
            local.append(local_tensor(grad) if isinstance(grad, DTensor) else grad)
    if local:
        amp_unscale_(local, found_inf, inv_scale)
    if owners and owners[0].group is not None:
        dist.all_reduce(found_inf, dist.ReduceOp.MAX, group=owners[0].group)
