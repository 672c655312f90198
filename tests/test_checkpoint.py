"""Checkpointer, save and load: what is saved by some ranks is loaded by others, bit for bit, or nothing changes."""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import Sent, message_of, run_alone, run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import dist_asgd
from dist_asgd import Checkpointer, ShardedASGD
from dist_asgd.checkpoint import CheckpointError, RandomState

# 0-d, empty, fewer rows than ranks, odd sizes in one to three dims
SHAPES = [(), (0,), (5, 0), (1,), (3,), (1001,), (7, 13), (2, 300), (5, 3, 11)]
DTYPES = [torch.float32, torch.bfloat16, torch.complex64, torch.int64]


def truth(shape, dtype):
    """The whole tensor that is saved, of any bits."""
    generator = torch.Generator().manual_seed(len(shape) + 7 * sum(shape))
    values = torch.randint(-(2**31), 2**31, (*shape, dtype.itemsize // 2), generator=generator).to(torch.int16)
    return values.view(dtype).reshape(shape) if values.numel() else torch.empty(shape, dtype=dtype)


def same_bits(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)


def bits(tensor):
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist()) if tensor.numel() else b""


def cut(value, mesh, dim):
    """A parameter of a DTensor that has rows, or columns, of it."""
    return value if dim >= value.ndim else distribute_tensor(value, mesh, [Shard(dim)])


def tensors(fill, world_size):
    """Of each shape and dtype a plain tensor, and DTensors cut along the first and along the second dim."""
    mesh = init_device_mesh("cpu", (world_size,))
    wholes = {f"{shape}{dtype}": truth(shape, dtype) for shape in SHAPES for dtype in DTYPES}
    if not fill:
        wholes = {name: torch.zeros_like(value) for name, value in wholes.items()}
    return {
        "plain": {name: value.clone() for name, value in wholes.items()},
        "rows": {name: cut(value, mesh, 0) for name, value in wholes.items()},
        "columns": {name: cut(value, mesh, 1) for name, value in wholes.items()},
    }


def save_tensors(rank, url, world_size):
    dist_asgd.save(f"{url}/{world_size}", tensors(True, world_size))


def load_tensors(rank, url, world_size):
    expected = tensors(True, world_size)
    for saved_by in range(1, 5):
        state = tensors(False, world_size)
        with Sent() as sent:
            dist_asgd.load(f"{url}/{saved_by}", state)
        for name, values in expected.items():
            for key, value in values.items():
                mine, whole = (x.to_local() if isinstance(x, DTensor) else x for x in (state[name][key], value))
                assert same_bits(mine, whole), (saved_by, name, key)
        # What ranks tell each other is the manifest and facts; tensors are read by whoever needs them.
        assert sum(sent.sizes) < 40 * os.path.getsize(f"{url}/{saved_by}/manifest.json")


def test_every_world_size_loads_what_every_other_has_saved(tmp_path):
    for world_size in range(1, 5):
        run_ranks(world_size, save_tensors, str(tmp_path), world_size)
    for world_size in range(1, 5):
        run_ranks(world_size, load_tensors, str(tmp_path), world_size)
