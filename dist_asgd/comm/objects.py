"""Sends picklable Python objects between the ranks of a process group, as uint8 tensors on the host.

torch.distributed's object collectives (``all_gather_object`` and its relatives) need NumPy, which torch itself can do
without. The functions of this module need torch only. Each one is collective: every rank of ``group`` must call it.
``group`` has a backend for tensors on the host, such as gloo, or is None for one process alone.

Received objects are unpickled, so every rank must be trusted, as with torch's object collectives.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_asgd.comm.collectives import all_gather


def all_gather_object(item: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Returns the ``item`` of every rank, in rank order, on every rank."""
    if group is None:
        return [item]
    data = bytearray(pickle.dumps(item))
    lengths = _all_gather_lengths(len(data), group)
    longest = max(lengths)
    data.extend(bytes(longest - len(data)))  # all_gather takes the same number of bytes from each rank
    received = bytearray(longest * len(lengths))
    all_gather(_tensor(received), _tensor(data), group=group)
    return [pickle.loads(memoryview(received)[rank * longest :]) for rank in range(len(lengths))]


def gather_object(item: Any, group: dist.ProcessGroup | None, to: int = 0) -> list[Any]:
    """Returns the ``item`` of every rank, in rank order, on rank ``to``, and an empty list on every other rank."""
    if group is None:
        return [item]
    data = bytearray(pickle.dumps(item))
    lengths = _all_gather_lengths(len(data), group)
    if dist.get_rank(group) != to:
        dist.send(_tensor(data), group=group, group_dst=to)
        return []
    return [item if rank == to else _receive(length, rank, group) for rank, length in enumerate(lengths)]


def scatter_object(items: Sequence[Any], group: dist.ProcessGroup | None) -> Any:
    """Returns to each rank its element of rank 0's ``items``. Other ranks' ``items`` are ignored.

    Args:
        items: on rank 0, one object for each rank, in rank order.
    """
    if group is None:
        return items[0]
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    pickles = [] if rank else [bytearray(pickle.dumps(item)) for item in items]
    lengths = torch.tensor(list(map(len, pickles)) or [0] * world_size, dtype=torch.int64, device="cpu")
    dist.broadcast(lengths, group=group, group_src=0)
    if rank:
        return _receive(lengths.tolist()[rank], 0, group)
    for other in range(1, world_size):
        dist.send(_tensor(pickles[other]), group=group, group_dst=other)
    return items[0]


def broadcast_object(item: Any, group: dist.ProcessGroup | None) -> Any:
    """Returns rank 0's ``item`` on every rank. Other ranks' ``item`` is ignored."""
    if group is None:
        return item
    data = bytearray() if dist.get_rank(group) else bytearray(pickle.dumps(item))
    length = torch.tensor([len(data)], dtype=torch.int64, device="cpu")
    dist.broadcast(length, group=group, group_src=0)
    data = data or bytearray(int(length))
    dist.broadcast(_tensor(data), group=group, group_src=0)
    return pickle.loads(data) if dist.get_rank(group) else item


def _all_gather_lengths(length: int, group: dist.ProcessGroup) -> list[int]:
    lengths = torch.empty(dist.get_world_size(group), dtype=torch.int64, device="cpu")
    all_gather(lengths, torch.tensor([length], dtype=torch.int64, device="cpu"), group=group)
    return lengths.tolist()


def _receive(length: int, source: int, group: dist.ProcessGroup) -> Any:
    data = bytearray(length)
    dist.recv(_tensor(data), group=group, group_src=source)
    return pickle.loads(data)


def _tensor(data: bytearray) -> Tensor:
    """Returns a 1-D uint8 tensor that shares the memory of ``data``, which must not be empty. No pickle is."""
    return torch.frombuffer(data, dtype=torch.uint8)
