"""The update rule in one pass over main memory on a CPU: kernels/cpu.c, compiled at first use for the dtypes at hand.

PyTorch's operators, even on blocks that stay in cache, move all data several times; one pass over main memory is the
least that a step can cost. A model has many small parameters, so one call takes a list of addresses: each parameter
then costs some nanoseconds instead of several operators.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from dist_asgd.asgd.rounding import compute_dtype
from dist_asgd.kernels.c_library import compile_library
from dist_asgd.kernels.selfcheck import matches_operators, warn_once
from dist_asgd.kernels.tensor_list import Gradients, SliceStep, TensorList, UpdateKind

FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno")
DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}

# Elements for each thread below which starting threads takes longer than they save.
GRAIN = 32 * 1024


class _Step(ctypes.Structure):
    """``Step`` of kernels/cpu.c."""

    _fields_ = [(name, ctypes.c_double) for name in ("shrink", "eta", "mu", "weight_decay")] + [
        (name, ctypes.c_int64) for name in ("maximize", "averages", "seed", "first")
    ]


class NativeUpdate:
    """Updates several parameters that share ``scalars`` in one pass. See ``FusedUpdate`` in kernels/dispatch.py.

    Args:
        function: ``update`` of kernels/cpu.c, compiled for the dtypes of what is updated.
    """

    takes_device_scalars = False

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __call__(self, parts: TensorList, grads: Gradients, step: SliceStep) -> None:
        h, scalars = step.h, step.scalars
        flags = (h.maximize, step.average is not None, step.rounding.seed or 0, step.rounding.first)
        numbers = _Step(1 - h.lambd * scalars.eta, scalars.eta, scalars.mu, h.weight_decay, *flags)
        tables = (parts.addresses, grads.addresses, parts.starts, parts.numels)
        threads = min(torch.get_num_threads(), max(1, parts.numel // GRAIN))
        self._function(
            *(table.buffer_info()[0] for table in tables),
            len(grads.addresses),
            None if step.average is None else step.average.data_ptr(),
            None if step.master is None else step.master.data_ptr(),
            ctypes.byref(numbers),
            threads,
        )


@functools.cache
def native_update(kind: UpdateKind) -> NativeUpdate | None:
    """Returns the compiled update of a kind, or None if it cannot be had or has other bits than the operators.

    The first call with a kind runs the C compiler; a message is logged, or a warning if it fails.
    """
    param, grad, rounded = kind.param, kind.grad, kind.rounded
    if param not in DTYPES or grad not in (param, compute_dtype(param)) or rounded not in DTYPES:
        return None
    types = [f"-DPARAM={DTYPES[param]}", f"-DGRAD={DTYPES[grad]}", f"-DMASTER={int(kind.has_master)}"]
    types += [f"-DROUNDED={DTYPES[rounded]}", f"-DSTOCHASTIC={int(kind.stochastic)}"]
    library = compile_library("cpu.c", [*FLAGS, *types], f"the update of {param} parameters in one pass over memory")
    if library is None:
        return None
    function, address, count = library.update, ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [address, address, address, address, count, address, address, address, count]
    function.restype = None
    update = NativeUpdate(function)
    if not matches_operators(update, torch.device("cpu"), kind):
        warn_once(f"the compiled update of {param} differs from PyTorch's operators on this CPU")
        return None
    return update
