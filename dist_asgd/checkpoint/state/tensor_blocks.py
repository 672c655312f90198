"""Blocks of tensors that this rank holds: of plain tensors, DTensors and ShardedTensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from dist_asgd._torch_private import AsyncCollectiveTensor, ShardedTensor
from dist_asgd.boxes import Box
from dist_asgd.checkpoint.format.dtypes import check_dtype
from dist_asgd.checkpoint.format.entries import Block, TensorEntry


@runtime_checkable
class Sharded(Protocol):
    """A tensor, such as DTensor, that tells which blocks of it this rank has.

    It is the private protocol ``_Checkpointable`` of ``torch.distributed._checkpointable``.
    """

    def __create_write_items__(self, fqn: str, object: Any) -> list[Any]: ...
    def __create_chunk_list__(self) -> list[Any]: ...
    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor: ...


def is_sharded(tensor: object) -> bool:
    """Returns whether ``tensor`` is a tensor of which this rank may hold only a part."""
    return isinstance(tensor, (Sharded, ShardedTensor))


def new_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a new tensor of the shape of ``tensor``, of which each rank has the blocks that it has of ``tensor``.

    The elements are arbitrary. A ShardedTensor of another dtype cannot be made, so it becomes a whole CPU tensor; so
    does a scalar (0-dim) DTensor.
    """
    if isinstance(tensor, ShardedTensor):
        if dtype == tensor.dtype:
            return tensor.clone()
        return torch.empty(tensor.shape, dtype=dtype, device="cpu")
    if tensor.ndim:
        return torch.empty_like(tensor.detach(), dtype=dtype)
    return torch.empty((), dtype=dtype, device="cpu" if is_sharded(tensor) else tensor.device)


def share_memory(tensor: Tensor, other: Tensor) -> bool:
    """Returns whether writing to one tensor may change the other: whether storages of both overlap."""
    ours, theirs = (
        [block.data.untyped_storage() for block in to_fill("", one).blocks if block.box.numel]
        for one in (tensor, other)
    )
    return any(
        a.device == b.device and a.data_ptr() < b.data_ptr() + b.nbytes() and b.data_ptr() < a.data_ptr() + a.nbytes()
        for a, b in itertools.product(ours, theirs)
    )


def to_save(key: str, tensor: Tensor) -> TensorEntry:
    """Returns the blocks of ``tensor`` that this rank is to save, which may be none. Copies nothing.

    Of a DTensor that ranks replicate, DTensor itself decides which rank has the block to write.

    Raises:
        TypeError: for a tensor that is not dense, has no memory, or has a dtype that checkpoints do not hold; the
            message has its ``key``.
    """
    if isinstance(tensor, Sharded):
        items = tensor.__create_write_items__(key, tensor)
        chunks = [(item.tensor_data.chunk, item.index) for item in items]
        return _entry(key, tensor, _sharded_blocks(tensor, chunks))
    return _entry_of_local_tensors(key, tensor)


def to_fill(key: str, tensor: Tensor) -> TensorEntry:
    """Returns all blocks of ``tensor`` that this rank has, to be written to. Copies nothing.

    Raises:
        TypeError: for a tensor that is not dense, has no memory, has a dtype that checkpoints do not hold, or has
            several elements in one place, and for a lazily conjugated or negated view; the message has its ``key``.
    """
    entry = _entry_to_fill(key, tensor)
    if any(_overlaps_itself(block.data) for block in entry.blocks):
        raise TypeError(
            f"{key} has several elements in one place of memory, as expand() and as_strided() make them, and cannot be "
            "written to: load into a tensor of its own, such as a clone()"
        )
    return entry


def _overlaps_itself(data: Tensor) -> bool:
    """Returns whether two elements of a plain tensor are in one place of memory."""
    dims = sorted((step, size) for step, size in zip(data.stride(), data.shape, strict=True) if size > 1)
    reach = 0  # the largest distance between two elements in the dims before, in elements
    for step, size in dims:
        if step <= reach and data.numel():
            places = torch.zeros(1, dtype=torch.int64, device="cpu")  # exact, and of no use for ordinary tensors
            for dim_step, dim_size in dims:
                places = (places[:, None] + dim_step * torch.arange(dim_size, device="cpu")).flatten()
            return len(places.unique()) < len(places)
        reach += step * (size - 1)
    return False


def _entry_to_fill(key: str, tensor: Tensor) -> TensorEntry:
    if isinstance(tensor, Sharded):
        chunks = [(chunk, MetadataIndex(key, chunk.offsets)) for chunk in tensor.__create_chunk_list__()]
        return _entry(key, tensor, _sharded_blocks(tensor, chunks))
    if not isinstance(tensor, ShardedTensor) and (tensor.is_conj() or tensor.is_neg()):
        raise TypeError(f"{key} is a lazily conjugated or negated view, which cannot be written to: load into a tensor")
    return _entry_of_local_tensors(key, tensor)


def _entry_of_local_tensors(key: str, tensor: Tensor) -> TensorEntry:
    if isinstance(tensor, ShardedTensor):
        shards = [(shard.metadata, shard.tensor) for shard in tensor.local_shards()]
        blocks = [(Box(tuple(metadata.shard_offsets), tuple(metadata.shard_sizes)), data) for metadata, data in shards]
        return _entry(key, tensor, blocks)
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_nested:
        kind = str(tensor.layout).removeprefix("torch.")
        kind = "nested" if tensor.is_nested else kind
        raise TypeError(
            f"{key} is a {kind} tensor on {tensor.device}: checkpoints have dense tensors with values. Give its parts "
            "as tensors of their own"
        )
    return _entry(key, tensor, [(Box((0,) * tensor.ndim, tuple(tensor.shape)), tensor)])


def _sharded_blocks(tensor: Sharded, chunks: Iterable[tuple[Any, MetadataIndex]]) -> Iterator[tuple[Box, Tensor]]:
    for chunk, index in chunks:
        yield Box(tuple(chunk.offsets), tuple(chunk.sizes)), tensor.__get_tensor_shard__(index)


def _entry(key: str, tensor: Tensor, blocks: Iterable[tuple[Box, Tensor]]) -> TensorEntry:
    check_dtype(key, tensor.dtype)
    # Empty blocks are left out, but for a tensor without elements, which would have no block at all.
    kept = [(box, data) for box, data in blocks if box.numel or not tensor.numel()]
    return TensorEntry(tuple(tensor.shape), tensor.dtype, [Block(box, _memory(key, data)) for box, data in kept])


def _memory(key: str, data: Tensor) -> Tensor:
    """Returns ``data`` as a plain tensor, waited for and with its elements in memory.

    Raises ``TypeError`` for a subclass of Tensor without memory, whose data pointer is 0: bytes are read from there.
    """
    if isinstance(data, AsyncCollectiveTensor):
        data = data.wait()
    if data.numel() and not data.data_ptr():
        raise TypeError(
            f"{key} is a {type(data).__name__} without memory of its own: checkpoints have dense tensors with values. "
            "Give its parts as tensors of their own"
        )
    return data.detach().resolve_conj().resolve_neg()
