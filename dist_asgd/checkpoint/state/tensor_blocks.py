"""Which blocks of a tensor this rank has, whatever kind of tensor it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from dist_asgd._torch_private import AsyncCollectiveTensor, ShardedTensor
from dist_asgd.boxes import Box
from dist_asgd.checkpoint.format.entries import Block, TensorEntry


@runtime_checkable
class Sharded(Protocol):
    """``_Checkpointable`` of torch.distributed: a tensor, such as DTensor, that tells which blocks a rank has."""

    def __create_write_items__(self, fqn: str, object: Any) -> list[Any]: ...
    def __create_chunk_list__(self) -> list[Any]: ...
    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor: ...


def is_sharded(tensor: object) -> bool:
    return isinstance(tensor, (Sharded, ShardedTensor))


def new_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """One not filled, in which ranks have the same blocks as in ``tensor``."""
    if isinstance(tensor, ShardedTensor):
        if dtype == tensor.dtype:
            return tensor.clone()
        return torch.empty(tensor.shape, dtype=dtype, device="cpu")
    if tensor.ndim:
        return torch.empty_like(tensor.detach(), dtype=dtype)
    return torch.empty((), dtype=dtype, device="cpu" if is_sharded(tensor) else tensor.device)


def share_memory(tensor: Tensor, other: Tensor) -> bool:
    """Whether what is written to one may change the other."""
    ours, theirs = (
        {block.data.untyped_storage().data_ptr() for block in to_fill("", one).blocks if block.box.numel}
        for one in (tensor, other)
    )
    return bool(ours & theirs)


def to_save(key: str, tensor: Tensor) -> TensorEntry:
    """With the blocks that this rank is to write, which may be none. No copies. Raises ``TypeError``."""
    if isinstance(tensor, Sharded):
        items = tensor.__create_write_items__(key, tensor)
        chunks = [(item.tensor_data.chunk, item.index) for item in items]
        return _entry(key, tensor, _sharded_blocks(tensor, chunks))
    return _whole(key, tensor)


def to_fill(key: str, tensor: Tensor) -> TensorEntry:
    """With all blocks that this rank has of the tensor, to be written to. Raises ``TypeError``."""
    if isinstance(tensor, Sharded):
        chunks = [(chunk, MetadataIndex(key, chunk.offsets)) for chunk in tensor.__create_chunk_list__()]
        return _entry(key, tensor, _sharded_blocks(tensor, chunks))
    if not isinstance(tensor, ShardedTensor) and (tensor.is_conj() or tensor.is_neg()):
        raise TypeError(f"{key} is a lazily conjugated or negated view, which cannot be written to: load into a tensor")
    return _whole(key, tensor)


def _whole(key: str, tensor: Tensor) -> TensorEntry:
    if isinstance(tensor, ShardedTensor):
        shards = [(shard.metadata, shard.tensor) for shard in tensor.local_shards()]
        blocks = [(Box(tuple(m.shard_offsets), tuple(m.shard_sizes)), data) for m, data in shards]
        return _entry(key, tensor, blocks)
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_nested:
        kind = str(tensor.layout).removeprefix("torch.")
        kind = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else kind
        raise TypeError(
            f"{key} is a {kind} tensor on {tensor.device}: checkpoints have dense tensors with values. Give its parts "
            "as tensors of their own"
        )
    return _entry(key, tensor, [(Box((0,) * tensor.ndim, tuple(tensor.shape)), tensor)])


def _sharded_blocks(tensor: Sharded, chunks: Iterable[tuple[Any, MetadataIndex]]) -> Iterator[tuple[Box, Tensor]]:
    for chunk, index in chunks:
        yield Box(tuple(chunk.offsets), tuple(chunk.sizes)), tensor.__get_tensor_shard__(index)


def _entry(key: str, tensor: Tensor, blocks: Iterable[tuple[Box, Tensor]]) -> TensorEntry:
    filled = [(box, data) for box, data in blocks if box.numel or not tensor.numel()]
    return TensorEntry(tuple(tensor.shape), tensor.dtype, [Block(box, _memory(key, data)) for box, data in filled])


def _memory(key: str, data: Tensor) -> Tensor:
    """The tensor whose memory it is. Raises ``TypeError`` where there is none: its address would be taken for one."""
    if isinstance(data, AsyncCollectiveTensor):
        data = data.wait()
    if data.numel() and not data.data_ptr():
        raise TypeError(
            f"{key} is a {type(data).__name__} without memory of its own: checkpoints have dense tensors with values. "
            "Give its parts as tensors of their own"
        )
    return data.detach().resolve_conj().resolve_neg()
