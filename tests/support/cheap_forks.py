"""Prepares this process for forks: a child copies the page tables, and every page that it or its parent writes to.

Hundreds of megabytes are torch and the modules of the tests, so the kernel's work is most of what a small world costs.
"""

import ctypes
import functools
import gc
import importlib
import re
from pathlib import Path

import torch

from dist_asgd import ShardedASGD
from dist_asgd.kernels.cpu import native_update
from dist_asgd.kernels.scan import LayoutScan
from dist_asgd.kernels.tensor_list import UpdateKind

HUGE_PAGE = 2**21
MADV_COLLAPSE = 25


@functools.cache
def prepare() -> None:
    """Has effect once in a process; its children are prepared."""
    _compile_kernels()
    _rehearse()
    gc.collect()
    gc.freeze()  # a collection writes to each object that it looks at, and so copies all of them
    _collapse_pages()


def _compile_kernels() -> None:
    """Compiles the update of a CPU for all dtypes, so that no child needs to."""
    for dtype in (torch.float32, torch.float64):
        native_update(UpdateKind(dtype, dtype, False, dtype, False))
    for dtype in (torch.bfloat16, torch.float16):
        for gradient in (dtype, torch.float32):
            native_update(UpdateKind(dtype, gradient, True, dtype, False))
            native_update(UpdateKind(dtype, gradient, False, dtype, False))
    LayoutScan.of([], [], torch.zeros(0))


def _rehearse() -> None:
    """Takes steps, so that children find imported what torch imports on first use, and caches and bytecode warm."""
    importlib.import_module("torch._dynamo")
    if torch.backends.cuda.is_built():
        return  # torch's optimizers look for a GPU, which no child could use then
    for kind in (ShardedASGD, torch.optim.ASGD):
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = kind([("weight", weight)], lr=0.1, t0=0)
        for _ in range(10):  # Python specializes a function's bytecode when it has run several times
            weight.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.state_dict()


def _collapse_pages() -> None:
    """Puts the heap into huge pages: 1/512 of the entries to copy. A kernel before 6.1 cannot and only says so."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for start, stop in re.findall(r"^(\w+)-(\w+) rw-p", Path("/proc/self/maps").read_text(), re.MULTILINE):
        address, size = int(start, 16), int(stop, 16) - int(start, 16)
        if size >= HUGE_PAGE:
            madvise(address, size, MADV_COLLAPSE)
