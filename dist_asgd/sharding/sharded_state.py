"""Tensors of sharded state dicts, which ``torch.distributed.checkpoint`` (DCP) saves and loads on any number of ranks.

``StatePiece`` stands for a tensor of which each rank holds a piece, ``ScalarCopy`` for a scalar that every rank holds.
Both implement DCP's ``_Checkpointable`` protocol (``torch/distributed/checkpoint/_extension.py``).
"""

from __future__ import annotations

import multiprocessing.reduction
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from dist_asgd._torch_private import (
    DEVICE_OF,
    TO_COPY,
    aten,
    disabled_torch_function,
    make_wrapper_subclass,
    refuse_data_pointers,
)
from dist_asgd.boxes import Box
from dist_asgd.sharding.no_memory import name_of, needs_memory
from dist_asgd.sharding.placement import Placement


class StatePiece(Tensor):
    """A tensor of a parameter's shape of which this rank holds one flat piece.

    It stands for ``ax`` or ``master`` in a sharded ``state_dict()``. DCP saves and loads it as boxes of the whole
    tensor. Operators that need the whole tensor raise ``NotImplementedError``. Pickling a piece that is not the whole
    tensor raises ``PicklingError``, unless ``rank_local`` has made it: a file of one rank's ``state_dict()`` would lack
    what the other ranks have, and nobody would know before it is loaded.

    Attributes:
        local: the elements ``[start, start + len(local))`` of this rank's block of the parameter, in memory order.
        start: position of the piece in the block.
        placement: the block: its position in the whole tensor, and its memory order.
        rank_local: whether the user knows that the piece is this rank's alone, and may pickle it.
        borrowed: whether ``local`` is the memory of something else, such as the parameter whose average has not
            started. It becomes a copy before it is written to.
    """

    local: Tensor  # 1-D, dtype of the average or master, may be empty
    start: int
    placement: Placement
    rank_local: bool
    borrowed: bool = False

    @staticmethod
    def __new__(cls, local: Tensor, start: int, placement: Placement, rank_local: bool = False) -> StatePiece:
        # torch takes a tensor on the meta device for no other's data or storage, so that p.data = piece raises. With a
        # real device it would give p a null pointer. dispatch_device makes piece.device that of the values.
        piece = make_wrapper_subclass(cls, placement.whole, dtype=local.dtype, device="meta", dispatch_device=True)
        refuse_data_pointers(piece)
        piece.local, piece.start, piece.placement, piece.rank_local = local, start, placement, rank_local
        return piece

    def like(self, local: Tensor) -> StatePiece:
        """Returns a piece of the same elements whose values are ``local``."""
        return StatePiece(local, self.start, self.placement, self.rank_local)

    def __repr__(self) -> str:  # type: ignore[override]
        stop = self.start + len(self.local)
        return f"StatePiece(shape={tuple(self.shape)}, dtype={self.dtype}, elements [{self.start}, {stop}))"

    def __reduce_ex__(self, protocol: Any) -> Any:
        if len(self.local) < self.numel() and not self.rank_local:
            raise pickle.PicklingError(
                f"this rank has {len(self.local)} of {self.numel()} elements of a state tensor, so that a file of "
                "its state_dict() lacks the others. Call full_state_dict() on every rank, which returns all of it on "
                "rank 0; or consolidate_state_dict(to=0) on every rank, after which state_dict() does; or save by a "
                "Checkpointer. For files that each rank writes and loads by itself, pickle rank_local(state_dict) of "
                "dist_asgd.pieces"
            )
        return self._rebuilt_from()

    def _rebuilt_from(self) -> tuple[Any, ...]:
        return StatePiece, (self.local.clone(), self.start, self.placement, self.rank_local)

    def __copy__(self) -> StatePiece:
        self.own()
        return self.like(self.local)

    def __deepcopy__(self, memo: dict[int, Any]) -> StatePiece:
        copy = self.like(self.local.clone())
        memo[id(self)] = copy
        return copy

    def _blocks(self) -> Iterator[tuple[Box, Tensor]]:
        """Yields the boxes that the piece fills in the whole tensor, each with a view of its elements."""
        if not self.numel():  # DCP expects a box of every tensor, and writes it once where several ranks offer it
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

    def own(self) -> None:
        """Makes borrowed memory a copy, which may be written to."""
        if self.borrowed:
            self.local, self.borrowed = self.local.clone(), False

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        self.own()  # DCP asks for this list in order to load into the blocks
        return [_chunk(box) for box, _ in self._blocks()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for box, block in self._blocks():
            if box.offsets == tuple(index.offset or ()):
                return block
        raise ValueError(f"this rank holds no block of {index.fqn} at offset {index.offset}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.data_ptr:
            return 0  # what tells DCP's stager, which asks for it, that there is no memory
        if needs_memory(func, args):
            raise _needs_whole(name_of(func), args)
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        piece = args[0]
        if func is DEVICE_OF:
            return piece.local.device
        if func in (aten.detach.default, aten.alias.default):
            piece.own()  # else one of the two could be written to and not the other
            return piece.like(piece.local)
        if func in (aten.clone.default, TO_COPY, aten.new_empty.default, aten.empty_like.default):
            kwargs = {key: value for key, value in (kwargs or {}).items() if key != "memory_format"}
            rest = args[1:] if func is not aten.new_empty.default else (piece.local.shape,)
            return piece.like(func(piece.local, *rest, **kwargs))
        if func in (aten.copy_.default, aten.equal.default) and all(isinstance(arg, StatePiece) for arg in args[:2]):
            other = args[1]
            same_piece = piece.start == other.start and len(piece.local) == len(other.local)
            if func is aten.equal.default:
                return same_piece and torch.equal(piece.local, other.local)
            if same_piece:
                piece.own()
                piece.local.copy_(other.local)
                return piece
        raise _needs_whole(func, args)


def _needs_whole(func: Any, args: Any) -> NotImplementedError:
    return NotImplementedError(
        f"{func} needs the whole tensor, and each rank holds a piece of it (here {_first_piece(args)!r}). "
        "with optimizer.averaged_parameters() puts the average into the parameters; full_state_dict(), called on "
        "every rank, gathers whole tensors on rank 0"
    )


class ScalarCopy(Tensor):
    """A 0-dim tensor of a sharded ``state_dict()`` that this rank loads from checkpoints and another rank saves.

    ``step``, ``eta`` and ``mu`` are equal on every rank. If N ranks offered them as plain tensors, DCP's planner would
    gather 3 N entries for each parameter on one rank, and drop all but 3. In every other respect a ``ScalarCopy`` is a
    plain tensor; operators on it and pickles of it make plain tensors.
    """

    __torch_function__ = disabled_torch_function  # results of operators are plain tensors

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


def rank_local(state: Any) -> Any:
    """Returns ``state`` with pieces that may be pickled, for a file that this rank alone writes and loads.

    The file loads on the rank that wrote it, on as many ranks and under the placements of then. Masters, and
    averages that have not started, are copied.

    Args:
        state: ``optimizer.state_dict()``, or dicts, lists and tuples with such state dicts in them.
    """
    if isinstance(state, StatePiece):
        state.own()
        return StatePiece(state.local, state.start, state.placement, rank_local=True)
    if isinstance(state, Mapping):
        return {key: rank_local(value) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(map(rank_local, state))
    return state


def _first_piece(args: Any) -> Any:
    return next((arg for arg in args if isinstance(arg, StatePiece)), args)


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(box.offsets), sizes=torch.Size(box.sizes))


# A pipe to another process of this rank is no file that outlives the run: async_save of torch.distributed.checkpoint
# sends state dicts to its background process so.
multiprocessing.reduction.register(StatePiece, StatePiece._rebuilt_from)

# torch.load(weights_only=True), its default, takes only pickled classes that it was told of. Version 0.1 pickled both
# under the name of another module.
torch.serialization.add_safe_globals(
    [StatePiece, Placement, (StatePiece, "dist_asgd.pieces.StatePiece"), (Placement, "dist_asgd.pieces.Placement")]
)
