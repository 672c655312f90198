"""One pass over main memory on a CPU: kernels/cpu.c and averaging.c, compiled at first use for the dtypes at hand.

PyTorch's operators, even on blocks that stay in cache, move all data several times; one pass over main memory is the
least that a step can cost. A model has many small parameters, so one call takes a list of addresses: each parameter
then costs some nanoseconds instead of several operators.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dist_asgd.asgd.rounding import Rounding, compute_dtype
from dist_asgd.asgd.schedule import AnyScalars, DeviceScalars, Hyperparameters
from dist_asgd.c_library import DTYPES, SAME_BITS, compile_library, warn_once
from dist_asgd.kernels.selfcheck import averages_match_operators, matches_operators
from dist_asgd.kernels.tensor_list import Gradients, SliceStep, TensorList, UpdateKind, pointer_to

FOLDER = Path(__file__).parent

# Elements for each thread below which starting threads takes longer than they save.
GRAIN = 32 * 1024


class _Step(ctypes.Structure):
    """``Step`` of kernels/cpu.c."""

    _fields_ = [(name, ctypes.c_double) for name in ("shrink", "eta", "weight_decay")] + [
        (name, ctypes.c_int64) for name in ("maximize", "seed", "first")
    ]


class _Numbers:
    """The numbers of a step as kernels/cpu.c reads them, which are equal in all buckets of a param group."""

    def __init__(self, h: Hyperparameters, scalars: AnyScalars, rounding: Rounding) -> None:
        if isinstance(scalars, DeviceScalars):
            raise RuntimeError("an update on a CPU needs its scalars on the host, and they are on a device")
        self.h, self.scalars = h, scalars
        eta, seed = scalars.eta, rounding.seed or 0
        self._step = _Step(1 - h.lambd * eta, eta, h.weight_decay, h.maximize, seed, rounding.first)
        self._mus = array("d", scalars.mus)
        self.step, self.mus = ctypes.addressof(self._step), pointer_to(self._mus)


class NativeUpdate:
    """Updates several parameters that share ``scalars`` in one pass. See ``FusedUpdate`` in kernels/dispatch.py.

    Args:
        function: ``update`` of kernels/cpu.c, compiled for the dtypes of what is updated.
    """

    takes_device_scalars = False

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function
        self._last: _Numbers | None = None

    def __call__(self, parts: TensorList, grads: Gradients, step: SliceStep) -> None:
        averages, scalars, h, rounding = step.averages, step.scalars, step.h, step.rounding
        numbers = self._last
        if numbers is None or not (numbers.scalars is scalars and numbers.h is h and rounding.seed is None):
            numbers = self._last = _Numbers(h, scalars, rounding)
        table = array("q", [average.data_ptr() for average in averages])
        addresses, starts, numels = parts.pointers
        self._function(
            addresses,
            grads.addresses.buffer_info()[0],
            starts,
            numels,
            len(grads.addresses),
            table.buffer_info()[0],
            numbers.mus,
            len(averages),
            None if step.master is None else step.master.data_ptr(),
            numbers.step,
            _threads(parts.numel),
        )


class NativeAveraging:
    """Moves averages towards parameters in one pass. See ``move_averages_`` in kernels/averaging.py.

    Args:
        function: ``move`` of kernels/averaging.c, compiled for the dtypes of parameters and averages.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __call__(self, parts: TensorList, averages: Sequence[Tensor], mus: Sequence[float]) -> None:
        addresses, fractions = array("q", map(Tensor.data_ptr, averages)), array("d", mus)
        count, tables = len(addresses), (pointer_to(addresses), pointer_to(fractions))
        self._function(*parts.pointers, len(parts.addresses), *tables, count, _threads(parts.numel))


def _threads(numel: int) -> int:
    """Returns the number of threads for a pass over ``numel`` elements."""
    return 1 if numel < 2 * GRAIN else min(torch.get_num_threads(), numel // GRAIN)


@functools.cache
def native_update(kind: UpdateKind) -> NativeUpdate | None:
    """Returns the compiled update of a kind, or None if it cannot be had or has other bits than the operators.

    The first call with a kind runs the C compiler; a message is logged, or a warning if it fails.
    """
    param, grad, rounded = kind.param, kind.grad, kind.rounded
    if param not in DTYPES or grad not in (param, compute_dtype(param)) or rounded not in DTYPES:
        return None
    types = [f"-DPARAM={DTYPES[param]}", f"-DREAL={DTYPES[compute_dtype(param)]}", f"-DGRAD={DTYPES[grad]}"]
    types += [f"-DMASTER={int(kind.has_master)}"]
    types += [f"-DROUNDED={DTYPES[rounded]}", f"-DSTOCHASTIC={int(kind.stochastic)}"]
    purpose = f"the update of {param} parameters in one pass over memory"
    library = compile_library(FOLDER / "cpu.c", [*SAME_BITS, *types], purpose)
    if library is None:
        return None
    function, address, count = library.update, ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [*[address] * 4, count, address, address, count, address, address, count]
    function.restype = None
    update = NativeUpdate(function)
    if not matches_operators(update, torch.device("cpu"), kind):
        warn_once(f"the compiled update of {param} differs from PyTorch's operators on this CPU")
        return None
    return update


@functools.cache
def native_averaging(param: torch.dtype, average: torch.dtype) -> NativeAveraging | None:
    """Returns the compiled pass for averages beside any optimizer, or None if it cannot be had or has other bits.

    The first call with a pair of dtypes runs the C compiler; a message is logged, or a warning if it fails.

    Args:
        param: the dtype of parameters.
        average: the dtype of averages, which must be fp32 or fp64 and no narrower than ``param``.
    """
    wider = torch.promote_types(param, average)
    if param not in DTYPES or average not in (torch.float32, torch.float64) or average != wider:
        return None
    flags = [*SAME_BITS, f"-DPARAM={DTYPES[param]}", f"-DREAL={DTYPES[average]}"]
    library = compile_library(FOLDER / "averaging.c", flags, f"averages of {param} parameters in one pass over memory")
    if library is None:
        return None
    function, address, count = library.move, ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [*[address] * 3, count, address, address, count, count]
    function.restype = None
    move = NativeAveraging(function)
    if not averages_match_operators(move, torch.device("cpu"), param, average):
        warn_once(f"the compiled pass for averages of {param} differs from PyTorch's operators on this CPU")
        return None
    return move
