"""Operators on gradients of which each rank has a part: elementwise ones act on the parts, reductions span the ranks.

Elementwise operators communicate nothing. They act in the order of the program, where a reduction of the gradient is
under way once it is complete (``FlatBucket.in_order``), because waiting for it could be for a rank that never
ran its backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_asgd._torch_private import TO_COPY, aten, is_mutable, tree_leaves, tree_map

# Elementwise operators that torch does not mark as such.
_ELEMENTWISE = frozenset(
    {TO_COPY, aten.copy_.default, aten.fill_.Scalar, aten.fill_.Tensor, aten.masked_fill_.Scalar, aten.zero_.default}
)

# Elementwise operators for which f(a) + f(b) is f(a + b), so that they may act on a part that is not reduced yet.
_LINEAR = frozenset({aten.mul_, aten.div_, aten.neg_})

# Operators that take one number from all elements.
_REDUCTIONS = frozenset(
    {
        aten.all.default,
        aten.any.default,
        aten.linalg_vector_norm.default,
        aten.max.default,
        aten.min.default,
        aten.sum.default,
    }
)


def apply(kind: type[Any], func: Any, args: Any, kwargs: Any) -> Any:
    """Returns what ``func`` gives for gradients in parts, or ``NotImplemented`` where it needs them whole.

    Args:
        kind: the class of gradients in parts, ``GradientPiece``.
    """
    name = func.overloadpacket.__name__
    if name.startswith("_foreach_") and isinstance(args[0], (list, tuple)):
        return _each(func, name.removeprefix("_foreach_"), args, kwargs)
    if func in _REDUCTIONS and len(args) <= 2 and not (set(kwargs) - {"dtype"}):
        return _reduce(args[0], func, args[1:], kwargs)
    pointwise = torch.Tag.pointwise in func.tags and torch.Tag.nondeterministic_seeded not in func.tags
    if not (pointwise or func in _ELEMENTWISE) or "out" in kwargs:
        return NotImplemented
    kwargs = {key: value for key, value in kwargs.items() if key != "memory_format"}
    leaves = tree_leaves((args, kwargs))
    pieces = [leaf for leaf in leaves if isinstance(leaf, kind)]
    first = pieces[0]
    if any(piece.owner is not first.owner or piece.position != first.position for piece in pieces):
        return NotImplemented
    if any(
        isinstance(leaf, Tensor) and torch.broadcast_shapes(leaf.shape, first.shape) != first.shape for leaf in leaves
    ):
        return NotImplemented
    if not is_mutable(func):
        return _new(kind, first, func, args, kwargs)
    return _change(kind, func, args, kwargs) if isinstance(args[0], kind) else NotImplemented


def _each(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Applies the operator for one tensor to each tensor of lists."""
    operator = aten.linalg_vector_norm if name == "norm" else getattr(aten, name, None)
    if operator is None or (name.startswith("addc") and func is getattr(aten, func.overloadpacket.__name__).ScalarList):
        return NotImplemented
    results = [
        operator(*(arg[index] if isinstance(arg, (list, tuple)) else arg for arg in args), **kwargs)
        for index in range(len(args[0]))
    ]
    return None if is_mutable(func) else results


def _change(kind: type[Any], func: Any, args: Any, kwargs: Any) -> Tensor:
    """Applies an operator that works in place to the gradient ``args[0]``."""
    piece = args[0]
    _require_alive(kind, (args, kwargs))
    if piece.pending is not None:
        others = [leaf for leaf in tree_leaves((args[1:], kwargs)) if isinstance(leaf, kind)]
        if others or not (piece.holds_unreduced_only or func.overloadpacket in _LINEAR):
            _raise_unreduced(piece, func)
        func(piece.pending, *args[1:], **kwargs)
        if piece.holds_unreduced_only:
            return piece
    piece.owner.note_change(piece.position, _in_words(kind, func, (args[1:], kwargs)))
    rest, named = _parts(kind, piece, (args[1:], kwargs))
    # On no elements first: bad arguments raise here on every rank, and not where a rank completes the reduction.
    func(piece.no_values(), *_values(kind, rest, empty=True), **_values(kind, named, empty=True))
    piece.owner.in_order(piece, lambda: func(piece.part, *_values(kind, rest), **_values(kind, named)))
    return piece


def _new(kind: type[Any], first: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """Returns a gradient in parts that an operator makes."""
    _require_alive(kind, (args, kwargs))
    for piece in tree_leaves((args, kwargs)):
        if isinstance(piece, kind) and piece.pending is not None:
            _raise_unreduced(piece, func)
    positional, named = _parts(kind, first, (args, kwargs))
    empty = func(*_values(kind, positional, empty=True), **_values(kind, named, empty=True))
    if not isinstance(empty, Tensor):
        return NotImplemented
    # The values of a gradient in low precision are wider than its dtype, which the result has as well.
    alike = [leaf.dtype for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, kind) and leaf.has_dtype(empty)]
    result = kind.made_from(first, alike[0] if alike and "dtype" not in kwargs else empty.dtype, empty.dtype)

    result.made_by = _in_words(kind, func, (args, kwargs))

    def fill() -> None:
        result.made_values = func(*_values(kind, positional), **_values(kind, named))

    first.owner.in_order(first, fill)
    return result


def _in_words(kind: type[Any], func: Any, arguments: Any) -> str:
    """Returns an operator and the numbers it is given, by which ranks compare what they do to gradients.

    The values of tensors on other devices than the CPU, and of whole tensors, are left out: reading them takes long.
    """
    numbers = []
    for leaf in tree_leaves(arguments):
        if isinstance(leaf, kind):
            numbers += [leaf.made_by] if leaf.made_by else []
        elif not isinstance(leaf, Tensor):
            numbers.append(repr(leaf))
        elif leaf.device.type == "cpu" and not leaf.ndim:
            numbers.append(repr(leaf.item()))
    return f"{func.overloadpacket.__name__}({', '.join(numbers)})"


def _reduce(piece: Any, func: Any, rest: Any, kwargs: Any) -> Tensor:
    """Returns the number that ``func`` takes from the gradient of all ranks. Collective."""
    owner = piece.owner
    operation = f"{func.overloadpacket.__name__} of the gradient of {owner.names[piece.position]!r}"
    with owner.gradient_sync.together(operation):
        _require_alive(type(piece), piece)
        if piece.pending is not None:
            _raise_unreduced(piece, func)
    owner.finish_reduce()
    own = piece.part
    if not own.numel():
        own = own.new_full((1,), _of_nothing(func, own.dtype, rest))
    mine = func(own, *rest, **kwargs).reshape(1)
    raw = mine.view(torch.uint8) if mine.dtype is torch.bool else mine
    of_ranks = [torch.empty_like(raw) for _ in range(dist.get_world_size(owner.group))]
    dist.all_gather(of_ranks, raw, group=owner.group)
    every = torch.cat(of_ranks).view(mine.dtype)
    if func is aten.linalg_vector_norm.default and rest and rest[0] == 0:
        return every.sum()  # the norm of order 0 counts
    return func(every, *rest, **kwargs)  # type: ignore[no-any-return]


def _of_nothing(func: Any, dtype: torch.dtype, rest: Any) -> float:
    """Returns the element of ``dtype`` that changes no result of the reduction ``func``."""
    if func in (aten.max.default, aten.min.default):
        low, high = (False, True) if dtype is torch.bool else (-math.inf, math.inf)
        if not (dtype.is_floating_point or dtype is torch.bool):
            low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
        return low if func is aten.max.default else high
    if func is aten.linalg_vector_norm.default and rest and rest[0] < 0:
        return math.inf
    return func is aten.all.default


def _require_alive(kind: type[Any], tree: Any) -> None:
    """Raises ``RuntimeError`` for a gradient that was dropped, or that an operator made of one that was dropped."""
    for piece in tree_leaves(tree):
        if isinstance(piece, kind):
            piece.require_alive()


def _parts(kind: type[Any], piece: Any, tree: Any) -> Any:
    """Returns ``tree`` with a copy of this rank's part in place of each whole tensor."""

    def part(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or isinstance(leaf, kind):
            return leaf
        leaf = leaf.detach()
        return piece.owner.part_of(piece.position, leaf.expand(piece.shape)).clone() if leaf.ndim else leaf.clone()

    return tree_map(part, tree)


def _values(kind: type[Any], tree: Any, empty: bool = False) -> Any:
    """Returns ``tree`` with the values in place of gradients in parts; with no elements if ``empty``."""

    def values(leaf: Any) -> Any:
        if isinstance(leaf, kind):
            return leaf.no_values() if empty else leaf.part
        return leaf[:0] if empty and isinstance(leaf, Tensor) and leaf.ndim else leaf

    return tree_map(values, tree)


def _raise_unreduced(piece: Any, func: Callable[..., Any]) -> None:
    raise RuntimeError(
        f"{func} is not possible on the gradient of {piece.owner.names[piece.position]!r}, to which a backward inside "
        "no_sync() has added what is not reduced yet: call it after a backward outside of no_sync()"
    )
