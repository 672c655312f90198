"""The rule in one pass over memory on a CPU: kernels/cpu.c, compiled when it is first needed, for the dtypes at hand.

Walking blocks by PyTorch's operators moves everything several times, if through caches; one pass over main memory is
what a step costs at least. Small parameters lie all over memory: the pass takes a list of their addresses, so that each
costs some nanoseconds and not several operators.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dist_asgd.asgd.rounding import Rounding, compute_dtype
from dist_asgd.asgd.schedule import Hyperparameters, Scalars
from dist_asgd.kernels.selfcheck import has_the_bits, say_once
from dist_asgd.kernels.tensor_list import Gradients, TensorList

SOURCE = Path(__file__).with_name("cpu.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")
DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}

# Below so many elements a thread, starting threads takes longer than they save.
GRAIN = 32 * 1024


class _Step(ctypes.Structure):
    _fields_ = [(name, ctypes.c_double) for name in ("shrink", "eta", "mu", "weight_decay")] + [
        (name, ctypes.c_int64) for name in ("maximize", "averages", "seed", "first")
    ]


class NativeUpdate:
    """One step of several parts, which share ``scalars``, in one pass. See ``FusedUpdate`` in kernels/dispatch.py.

    Args:
        function: ``update`` of kernels/cpu.c.
    """

    takes_device_scalars = False

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __call__(
        self,
        parts: TensorList,
        grads: Gradients,
        average: Tensor | None,
        master: Tensor | None,
        h: Hyperparameters,
        scalars: Scalars,
        rounding: Rounding,
    ) -> None:
        shrink = 1 - h.lambd * scalars.eta
        flags = (h.maximize, average is not None, rounding.seed or 0, rounding.first)
        step = _Step(shrink, scalars.eta, scalars.mu, h.weight_decay, *flags)
        tables = (parts.addresses, grads.addresses, parts.starts, parts.numels)
        threads = min(torch.get_num_threads(), max(1, parts.numel // GRAIN))
        self._function(
            *(table.buffer_info()[0] for table in tables),
            len(grads.addresses),
            None if average is None else average.data_ptr(),
            None if master is None else master.data_ptr(),
            ctypes.byref(step),
            threads,
        )


@functools.cache
def native_update(
    param: torch.dtype, grad: torch.dtype, has_master: bool, rounded: torch.dtype, stochastic: bool
) -> NativeUpdate | None:
    """For these dtypes; None where there is no compiler, or what it makes has other bits than PyTorch's operators.

    Args:
        rounded: as ``Rounding.dtype``.
        stochastic: ``Rounding.seed`` is not None.
    """
    if param not in DTYPES or grad not in (param, compute_dtype(param)) or rounded not in DTYPES:
        return None
    found = compiler()
    if found is None:
        say_once(f"no C compiler found ({', '.join(COMPILERS)})")
        return None
    types = [f"-DPARAM={DTYPES[param]}", f"-DGRAD={DTYPES[grad]}", f"-DMASTER={int(has_master)}"]
    types += [f"-DROUNDED={DTYPES[rounded]}", f"-DSTOCHASTIC={int(stochastic)}"]
    try:
        function = compiled(found, [*FLAGS, *types, str(SOURCE)]).update
    except (OSError, subprocess.SubprocessError) as error:
        say_once(f"{found} failed", getattr(error, "stderr", None) or str(error))
        return None
    address, count = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [address, address, address, address, count, address, address, address, count]
    function.restype = None
    update = NativeUpdate(function)
    rounding = Rounding(rounded, 1234 if stochastic else None, 5)
    if not has_the_bits(update, torch.device("cpu"), param, grad, has_master, rounding):
        say_once(f"the compiled update of {param} differs from PyTorch's operators on this CPU")
        return None
    return update


def compiler() -> str | None:
    """The path of a C compiler, if there is one."""
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def compiled(compiler: str, arguments: Sequence[str], kind: type[ctypes.CDLL] = ctypes.CDLL) -> ctypes.CDLL:
    """Anew in each process, which takes 0.2 s: a library that others could have written must not be loaded."""
    with tempfile.TemporaryDirectory(prefix="dist_asgd-") as folder:
        library = f"{folder}/native.so"
        command = [compiler, *arguments, "-o", library, "-lm"]
        run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=60)
        if run([*command, "-fopenmp"]).returncode != 0:  # Apple's compiler has none: then by one thread
            run(command, check=True)
        return kind(library)
