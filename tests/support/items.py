"""Tensors of every dtype, and items made of them, for the tests of checkpoints."""

import zlib

import torch

from dist_asgd.checkpoint.format.dcp_metadata import item_head, item_tail
from dist_asgd.checkpoint.format.dtypes import DTYPES as CHECKPOINT_DTYPES

DTYPES = list(CHECKPOINT_DTYPES.values())
SHAPES = [(), (0,), (1,), (7,), (3, 0, 2), (2, 3), (5, 1, 4), (2, 3, 4, 5), (300, 70_000 // 300)]


def sample(dtype, shape, seed=0):
    """A tensor with every kind of byte that its dtype allows."""
    numel = torch.Size(shape).numel()
    raw = torch.randint(0, 256, (numel * dtype.itemsize,), generator=torch.Generator().manual_seed(seed))
    raw = (raw % 2 if dtype == torch.bool else raw).to(torch.uint8)
    return raw.view(dtype).reshape(shape) if numel else torch.empty(shape, dtype=dtype)


def raw_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def item(tensor):
    payload = raw_bytes(tensor)
    head = item_head(tensor.dtype, tensor.shape)
    return head + payload + item_tail(tensor.dtype, tensor.shape, zlib.crc32(payload))
