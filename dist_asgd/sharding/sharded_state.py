"""How parameters lie in buckets, and the tensors that stand for a piece of one in state dicts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from dist_asgd._torch_private import TO_COPY, aten, disabled_torch_function, make_wrapper_subclass
from dist_asgd.boxes import Box
from dist_asgd.sharding.placement import Placement


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
        piece = make_wrapper_subclass(cls, placement.whole, dtype=local.dtype, device=local.device)
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
        if func in (aten.clone.default, TO_COPY, aten.new_empty.default, aten.empty_like.default):
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

    __torch_function__ = disabled_torch_function  # what is computed with it is plain

    @staticmethod
    def __new__(cls, value: Tensor) -> ScalarCopy:
        return value.as_subclass(cls)

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


# torch.load(weights_only=True), its default, takes only pickled classes that it was told of. Version 0.1 pickled both
# under the name of another module.
torch.serialization.add_safe_globals(
    [StatePiece, Placement, (StatePiece, "dist_asgd.pieces.StatePiece"), (Placement, "dist_asgd.pieces.Placement")]
)
