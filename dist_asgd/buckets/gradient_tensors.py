"""What stands as ``p.grad`` where gradients are in parts on several ranks, and GradScaler's look at all of them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
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
    make_wrapper_subclass,
)


class Reducing(Protocol):
    """What gradients ask of the optimizer that they are for."""

    @property
    def passes(self) -> int: ...
    @property
    def enabled(self) -> bool: ...
    def agree_on(self, operation: str) -> None: ...
    def warn_reduced_twice(self) -> None: ...


class GradientOwner(Protocol):
    """What gradients ask of the bucket of their parameters."""

    group: dist.ProcessGroup | None  # the ranks of the optimizer

    @property
    def reducing(self) -> Reducing | None: ...
    def gradient_tensors(self) -> list[Tensor]: ...


class PieceOwner(GradientOwner, Protocol):
    """What a ``GradientPiece`` asks besides."""

    def zero_gradient(self, gradient: GradientPiece) -> None: ...


class GradientPiece(Tensor):
    """The ``p.grad`` of a parameter whose gradient was reduced: this rank's piece of it, which ``owner`` holds.

    It has the parameter's shape and dtype and supports what happens to gradients between backward and step:
    accumulation by another backward, zeroing, ``GradScaler.unscale_`` (all ranks call it; an inf on one rank's piece
    is seen by all). Setting ``p.grad`` to None drops it. Everything else needs the whole gradient and raises.

    Attributes:
        position: of the parameter in its bucket.
        contributed: whether this rank had a gradient, in any of the reductions that the piece has accumulated.
        begun: the number of the first pass (see reducer.py) that it holds; later than all of them once it was dropped.
        pending: a gradient of this rank, of the parameter's shape, that has not been reduced yet; or None.
    """

    _owner: weakref.ref[PieceOwner]
    position: int
    contributed: bool
    begun: int
    pending: Tensor | None

    @staticmethod
    def __new__(cls, owner: PieceOwner, position: int, param: Tensor) -> GradientPiece:
        piece = make_wrapper_subclass(cls, param.shape, strides=param.stride(), dtype=param.dtype, device=param.device)
        piece.position = position
        # Weakly: a gradient that outlives its optimizer should not keep the optimizer's memory.
        piece._owner, piece.contributed, piece.begun, piece.pending = weakref.ref(owner), False, 0, None
        return piece

    @property
    def owner(self) -> PieceOwner:
        owner = self._owner()
        if owner is None:
            raise RuntimeError("this gradient belongs to an optimizer that is gone: set p.grad = None")
        return owner

    def __repr__(self) -> str:  # type: ignore[override]
        return f"GradientPiece(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Comes before any dispatch, and so before that of the DTensors among which the piece may be.
        if func is amp_unscale_:
            return unscale_(*args)
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        in_backward = current_graph_task_id() != -1
        if in_backward and func in (aten.add_.Tensor, aten.add.Tensor) and isinstance(args[0], GradientPiece):
            piece, grad = args
            if piece.pending is None:
                piece.pending = grad.detach().clone()  # the engine may use it for other parameters as well
            elif piece.pending.layout is torch.strided:  # else it is sparse: it stays, to be refused before the step
                piece.pending = piece.pending + grad.detach()
            return piece
        if func in (aten.zero_.default, FOREACH_ZERO_):
            several = isinstance(args[0], (list, tuple))
            for grad in args[0] if several else [args[0]]:
                if isinstance(grad, GradientPiece):
                    grad.owner.zero_gradient(grad)
                else:
                    grad.zero_()
            return None if several else args[0]
        if func is aten.detach.default:
            return args[0]
        if in_backward and func is aten.copy_.default and isinstance(args[0], GradientPiece):
            # DistributedDataParallel writes the mean that it has computed as well: the same that the piece holds.
            if args[0].owner.reducing is not None:
                args[0].owner.reducing.warn_reduced_twice()
            return args[0]
        raise RuntimeError(
            f"{func} needs a whole gradient, and gradients='local' leaves each rank a piece of the reduced one. To "
            "clip by norm, or to log the norm, use the optimizer's clip_grad_norm_(), which returns it (max_norm="
            "math.inf changes nothing). Whatever else reads gradients needs them whole: inside no_sync(), or under "
            "DistributedDataParallel with gradients='reduced'. Drop them (zero_grad()) before you convert the model"
        )


class PlacedGradient(DTensor):
    """The ``p.grad`` of a DTensor after backward: a DTensor in everything, but for GradScaler.

    torch's unscaling looks for infs on the mesh of the first gradient that it is given, and takes no plain gradients
    along; so ranks of another mesh would go on without those that take the step.
    """

    _owner: weakref.ref[GradientOwner]

    @classmethod
    def mark(cls, grad: DTensor, owner: GradientOwner) -> None:
        """Makes ``grad`` one. It has been handed out already: only its class changes."""
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
    """GradScaler's unscaling: multiplies by ``inv_scale``, sets ``found_inf`` to 1 if any rank has a non-finite value.

    Collective where one of the gradients is in parts.
    """
    found = [grad.owner for grad in grads if isinstance(grad, (GradientPiece, PlacedGradient))]
    owners = list(dict.fromkeys(owner for owner in found if owner is not None))
    for reducing in {id(owner.reducing): owner.reducing for owner in owners}.values():
        if reducing is not None:
            reducing.agree_on("GradScaler.unscale_()")
    pieces = list(dict.fromkeys(grad.owner for grad in grads if isinstance(grad, GradientPiece)))
    local = [tensor for owner in pieces for tensor in owner.gradient_tensors()]
    for grad in grads:
        if not isinstance(grad, GradientPiece):
            local.append(local_tensor(grad) if isinstance(grad, DTensor) else grad)
    if local:
        amp_unscale_(local, found_inf, inv_scale)
    if owners and owners[0].group is not None:
        dist.all_reduce(found_inf, dist.ReduceOp.MAX, group=owners[0].group)
