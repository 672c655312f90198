"""How parameters lie in buckets, and the tensors that stand for a piece of one in state dicts."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from dist_asgd.layout import Box, boxes

aten = torch.ops.aten


@dataclass(frozen=True)
class Placement:
    """How what a rank has of a parameter lies in its bucket: its shape, and the strides it keeps there.

    A dense tensor keeps its memory order (channels_last, transposed), so that its gradient has the same order and is
    moved without a permutation. ``order`` lists the dims from the slowest to the fastest varying one. Of a DTensor it
    is the local tensor, which is the block of the ``whole`` parameter at ``offsets``.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    order: tuple[int, ...]
    offsets: tuple[int, ...]
    whole: tuple[int, ...]  # shape of the whole parameter

    @classmethod
    def of(cls, tensor: Tensor) -> Placement:
        """Of a parameter, or of a value that is placed as one."""
        local, offsets = tensor, (0,) * tensor.ndim
        if isinstance(tensor, DTensor):
            local, offsets = local_tensor(tensor), tuple(tensor.__create_chunk_list__()[0].offsets)
        strides = torch.empty_like(local, device="meta").stride()  # those of a dense copy
        order = sorted(range(local.ndim), key=lambda dim: -strides[dim] if local.shape[dim] != 1 else -math.inf)
        return cls(tuple(local.shape), tuple(strides), tuple(order), offsets, tuple(tensor.shape))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_row_major(self) -> bool:
        return self.order == tuple(range(len(self.shape)))

    def view(self, flat: Tensor) -> Tensor:
        """The parameter's own view of its ``numel`` elements in memory order."""
        return flat.as_strided(self.shape, self.strides, flat.storage_offset())

    def flatten(self, tensor: Tensor) -> Tensor:
        """The elements of a tensor of this shape in the parameter's memory order, 1-D; a copy only where it must be."""
        if tensor.ndim == 1 and tensor.is_contiguous():
            return tensor
        return tensor.permute(self.order).reshape(-1)

    def same_block(self, other: Placement) -> bool:
        """Whether both are the same block of a parameter, or empty."""
        same = self.shape == other.shape and self.offsets == other.offsets
        return same or not (self.numel or other.numel)

    def block_of(self, value: Tensor) -> Tensor:
        """This rank's block, of ``shape``, of a ``value`` of the whole parameter, or of a DTensor that has it."""
        if isinstance(value, DTensor):
            return local_tensor(value)
        for dim, (offset, size) in enumerate(zip(self.offsets, self.shape, strict=True)):
            value = value.narrow(dim, min(offset, value.shape[dim]), size)  # empty ones may begin behind the end
        return value

    def new_whole(self, dtype: torch.dtype) -> Tensor:
        """A whole tensor on the CPU, not filled; in the parameter's memory order where the rank has all of it."""
        if self.shape == self.whole:
            return torch.empty_strided(self.whole, self.strides, dtype=dtype, device="cpu")
        return torch.empty(self.whole, dtype=dtype, device="cpu")

    def fill(self, whole: Tensor, start: int, flat: Tensor) -> None:
        """Writes ``flat``, the elements from ``start`` on of what the rank has, to where they belong in ``whole``."""
        offset = 0
        for box in self.boxes(start, start + len(flat)):
            part = whole
            for dim, (first, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
                part = part.narrow(dim, first, size)
            part.copy_(self.box_view(flat[offset : offset + box.numel], box))
            offset += box.numel

    def boxes(self, start: int, stop: int) -> list[Box]:
        """The blocks of the whole parameter that the flat range covers, in the order of their elements."""
        return [
            Box(tuple(map(operator.add, self.offsets, self._unpermute(box.offsets))), self._unpermute(box.sizes))
            for box in boxes([self.shape[dim] for dim in self.order], start, stop)
        ]

    def box_view(self, flat: Tensor, box: Box) -> Tensor:
        """``flat``, the elements of ``box`` in memory order, as a tensor of the box's sizes."""
        permuted = flat.view([box.sizes[dim] for dim in self.order])
        return permuted.permute(self._unpermute(range(len(self.order))))

    def _unpermute(self, values: Sequence[int]) -> tuple[int, ...]:
        result = [0] * len(self.order)
        for value, dim in zip(values, self.order, strict=True):
            result[dim] = value
        return tuple(result)


def local_tensor(tensor: DTensor) -> Tensor:
    """What this rank has of it. ``to_local()`` is the same, but of a parameter it makes a view, which takes longer."""
    return tensor._local_tensor


class StatePiece(Tensor):
    """A tensor of a parameter's shape of which this rank holds one flat piece.

    It stands for ``ax`` or ``master`` in a sharded ``state_dict()``. ``torch.distributed.checkpoint`` saves and loads
    it, with any number of ranks, as blocks of the whole tensor (it implements DCP's ``_Checkpointable`` protocol).

    Attributes:
        local: 1-D, the elements ``[start, start + len(local))``, in memory order, of what the rank has of the
            parameter; may be empty.
        start: int, see ``local``.
        placement: where in the whole tensor that is, and its memory order.
    """

    local: Tensor
    start: int
    placement: Placement

    @staticmethod
    def __new__(cls, local: Tensor, start: int, placement: Placement) -> StatePiece:
        piece = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, placement.whole, dtype=local.dtype, device=local.device
        )
        piece.local, piece.start, piece.placement = local, start, placement
        return piece

    def __repr__(self) -> str:  # type: ignore[override]
        stop = self.start + len(self.local)
        return f"StatePiece(shape={tuple(self.shape)}, dtype={self.dtype}, elements [{self.start}, {stop}))"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return StatePiece, (self.local.clone(), self.start, self.placement)

    def __deepcopy__(self, memo: dict[int, Any]) -> StatePiece:
        copy = StatePiece(self.local.clone(), self.start, self.placement)
        memo[id(self)] = copy
        return copy

    def _blocks(self) -> Iterator[tuple[Box, Tensor]]:
        """Each box of the piece with a view of its elements, of the box's sizes."""
        if not self.numel():  # DCP expects a block of every tensor; ranks that offer the same write it once
            yield Box((0,) * self.ndim, self.placement.whole), self.local.view(self.placement.whole)
            return
        offset = 0
        for box in self.placement.boxes(self.start, self.start + len(self.local)):
            yield box, self.placement.box_view(self.local[offset : offset + box.numel], box)
            offset += box.numel

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(box.offsets), index),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=_chunk(box), properties=properties, size=self.shape),
            )
            for index, (box, _) in enumerate(self._blocks())
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(box) for box, _ in self._blocks()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for box, block in self._blocks():
            if box.offsets == tuple(index.offset or ()):
                return block
        raise ValueError(f"this rank holds no block of {index.fqn} at offset {index.offset}")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        piece = args[0]
        if func in (aten.detach.default, aten.alias.default):
            return StatePiece(piece.local, piece.start, piece.placement)
        if func in (aten.clone.default, aten._to_copy.default, aten.new_empty.default, aten.empty_like.default):
            kwargs = {key: value for key, value in (kwargs or {}).items() if key != "memory_format"}
            rest = args[1:] if func is not aten.new_empty.default else (piece.local.shape,)
            return StatePiece(func(piece.local, *rest, **kwargs), piece.start, piece.placement)
        if func in (aten.copy_.default, aten.equal.default) and all(isinstance(arg, StatePiece) for arg in args[:2]):
            other = args[1]
            same_piece = piece.start == other.start and len(piece.local) == len(other.local)
            if func is aten.equal.default:
                return same_piece and torch.equal(piece.local, other.local)
            if same_piece:
                piece.local.copy_(other.local)
                return piece
        raise NotImplementedError(
            f"{func} needs the whole tensor, and each rank holds a piece of it (here {_first_piece(args)!r}). "
            "with optimizer.averaged_parameters() puts the average into the parameters; full_state_dict(), called on "
            "every rank, gathers whole tensors on rank 0"
        )


class ScalarCopy(Tensor):
    """A 0-dim tensor of a sharded ``state_dict()`` that another rank writes to checkpoints, and this one only reads.

    ``step``, ``eta`` and ``mu`` are the same on every rank. As plain tensors each of N ranks would offer all of them to
    the planner of ``torch.distributed.checkpoint``, which gathers N times 3 for each parameter on one rank, to drop all
    but one. In every other respect it is a plain tensor, and so are copies of it.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # what is computed with it is plain

    @staticmethod
    def __new__(cls, value: Tensor) -> ScalarCopy:
        return Tensor._make_subclass(cls, value)

    def plain(self) -> Tensor:
        return torch.Tensor.as_subclass(self, Tensor)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> ScalarCopy:
        copy = ScalarCopy(self.plain().clone())
        memo[id(self)] = copy
        return copy

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        return []

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(Box((), ()))]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.plain()


def _first_piece(args: Any) -> Any:
    return next((arg for arg in args if isinstance(arg, StatePiece)), args)


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(box.offsets), sizes=torch.Size(box.sizes))


# So that torch.load(weights_only=True), its default, takes state dicts that torch.save has written.
torch.serialization.add_safe_globals([StatePiece, Placement])
