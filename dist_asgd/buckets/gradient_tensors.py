"""Tensors that stand as ``p.grad`` where gradients are in parts on several ranks, and their unscaling."""

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

    def zero_gradient(self, gradient: GradientPiece) -> None:
        """Sets one gradient to zero. No communication."""


class GradientPiece(Tensor):
    """The ``p.grad`` of a parameter whose gradient was reduced over ranks: stands for the piece that this rank owns.

    The values are in the ``grad`` of ``owner``, the bucket. The tensor has the parameter's shape and dtype, and no
    memory. It supports accumulation by another backward, zeroing, and ``GradScaler.unscale_``, which every rank must
    call and in which every rank sees an inf of any rank. Setting ``p.grad`` to None drops it. Other operators need the
    whole gradient and raise ``RuntimeError``.

    Attributes:
        position: position of the parameter in its bucket.
        contributed: whether this rank had a gradient in any of the reductions that the piece has accumulated.
        first_pass: number of the first reduction pass (see buckets/reducer.py) that the piece holds; above all passes
            for a piece that was dropped, or that holds no reduced gradient yet.
        pending: a gradient of this rank that is not reduced yet; None if there is none.
    """

    _owner: weakref.ref[PieceOwner]
    position: int
    contributed: bool
    first_pass: int
    pending: Tensor | None  # shape of the parameter

    @staticmethod
    def __new__(cls, owner: PieceOwner, position: int, param: Tensor) -> GradientPiece:
        piece = make_wrapper_subclass(cls, param.shape, strides=param.stride(), dtype=param.dtype, device=param.device)
        piece.position = position
        # The reference is weak, so that a gradient that outlives its optimizer does not keep the optimizer's memory.
        piece._owner, piece.contributed, piece.first_pass, piece.pending = weakref.ref(owner), False, 0, None
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
        # __torch_dispatch__ would be too late: a DTensor in one list with the piece might get there first.
        if func is amp_unscale_:
            return unscale_(*args)
        return super().__torch_function__(func, types, args, kwargs)

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
        raise RuntimeError(
            f"{func} needs a whole gradient, and gradients='local' leaves each rank a piece of the reduced one. To "
            "clip by norm, or to log the norm, use the optimizer's clip_grad_norm_(), which returns it (max_norm="
            "math.inf changes nothing). Whatever else reads gradients needs them whole: inside no_sync(), or under "
            "DistributedDataParallel with gradients='reduced'. Drop them (zero_grad()) before you convert the model"
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
