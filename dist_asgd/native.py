"""The rule in one pass over memory on a CPU: native.c, compiled when it is first needed, for the dtypes at hand.

Walking blocks by PyTorch's operators moves everything several times, if through caches; one pass over main memory is
what a step costs at least. Small parameters lie all over memory: the pass takes a list of their addresses, so that each
costs some nanoseconds and not several operators.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import shutil
import subprocess
import tempfile
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dist_asgd.parts import Parts
from dist_asgd.rule import Hyperparameters, Rounding, Scalars, compute_dtype, low_precision_step_

SOURCE = Path(__file__).with_name("native.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")
DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}

# Below so many elements a thread, starting threads takes longer than they save.
GRAIN = 32 * 1024

# Elements on which each combination of options is compared with PyTorch's operators: some blocks of theirs and a rest.
CHECKED = 211

logger = logging.getLogger(__name__)
_said: set[str] = set()


class _Step(ctypes.Structure):
    _fields_ = [(name, ctypes.c_double) for name in ("shrink", "eta", "mu", "weight_decay")] + [
        (name, ctypes.c_int64) for name in ("maximize", "averages", "seed", "first")
    ]


class NativeUpdate:
    """One step of several parts, which share ``scalars``, in one pass. See ``FusedUpdate`` in update.py.

    Args:
        function: ``update`` of native.c.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __call__(
        self,
        parts: Parts,
        grads: Sequence[Tensor],
        average: Tensor | None,
        master: Tensor | None,
        h: Hyperparameters,
        scalars: Scalars,
        rounding: Rounding,
    ) -> None:
        shrink = 1 - h.lambd * scalars.eta
        flags = (h.maximize, average is not None, rounding.seed or 0, rounding.first)
        step = _Step(shrink, scalars.eta, scalars.mu, h.weight_decay, *flags)
        tables = (parts.addresses, array("q", map(Tensor.data_ptr, grads)), parts.starts, parts.numels)
        threads = min(torch.get_num_threads(), max(1, parts.numel // GRAIN))
        self._function(
            *(table.buffer_info()[0] for table in tables),
            len(grads),
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
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        _say_once(f"no C compiler found ({', '.join(COMPILERS)})")
        return None
    types = [f"-DPARAM={DTYPES[param]}", f"-DGRAD={DTYPES[grad]}", f"-DMASTER={int(has_master)}"]
    types += [f"-DROUNDED={DTYPES[rounded]}", f"-DSTOCHASTIC={int(stochastic)}"]
    try:
        function = _compiled(compiler, types).update
    except (OSError, subprocess.SubprocessError) as error:
        _say_once(f"{compiler} failed", getattr(error, "stderr", None) or str(error))
        return None
    address, count = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [address, address, address, address, count, address, address, address, count]
    function.restype = None
    update = NativeUpdate(function)
    if not _has_the_bits(update, param, grad, has_master, Rounding(rounded, 1234 if stochastic else None, 5)):
        _say_once(f"the compiled update of {param} differs from PyTorch's operators on this CPU")
        return None
    return update


def _compiled(compiler: str, types: Sequence[str]) -> ctypes.CDLL:
    """Anew in each process, which takes 0.2 s: a library that others could have written must not be loaded."""
    with tempfile.TemporaryDirectory(prefix="dist_asgd-") as folder:
        library = f"{folder}/native.so"
        command = [compiler, *FLAGS, *types, str(SOURCE), "-o", library, "-lm"]
        run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=60)
        if run([*command, "-fopenmp"]).returncode != 0:  # Apple's compiler has none: then by one thread
            run(command, check=True)
        return ctypes.CDLL(library)


def _say_once(what: str, why: str = "") -> None:
    if what not in _said:
        _said.add(what)
        logger.warning(
            "%s; updates on the CPU go by PyTorch's operators, which takes about twice as long. %s", what, why
        )


def _has_the_bits(
    update: NativeUpdate, param: torch.dtype, grad: torch.dtype, has_master: bool, rounding: Rounding
) -> bool:
    """Whether it does what PyTorch's operators do, as far as all combinations of options on some values can tell."""
    generator, dtype = torch.Generator().manual_seed(0), compute_dtype(param)
    combinations = itertools.product((False, True), (0.0, 0.1), (False, True), (1.0, 0.3))
    for maximize, weight_decay, averages, mu in combinations:
        h = Hyperparameters(lr=0.1, lambd=0.1, alpha=0.75, t0=0.0, weight_decay=weight_decay, maximize=maximize)
        scalars = Scalars(step=3, eta=0.07, mu=mu)
        first, second, average, other = torch.randn(4, CHECKED, dtype=torch.float64, generator=generator).to(dtype)
        p, g = first.to(param), second.to(grad)
        # Half of the masters are those of the parameters, half out of date.
        p = torch.where(second > 0, p, p.to(rounding.dtype).to(param))  # some have been rounded
        master = torch.where(other > 0, p.to(dtype), other)
        own, expected = ([tensor.clone() for tensor in (p, average, master)] for _ in range(2))
        options = (h, scalars, rounding)
        update(Parts.of(own[:1]), [g], own[1] if averages else None, own[2] if has_master else None, *options)
        p, average, master = expected
        low_precision_step_(p, g, average if averages else None, master if has_master else None, *options)
        if not all(map(torch.equal, own, expected)):
            return False
    return True
