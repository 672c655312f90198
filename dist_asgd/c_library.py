"""Compiles C files of this package by the machine's C compiler, once in each process, and loads them.

A compiled file is not kept for other processes: compiling takes some tenths of a second, and a library that another
user could have written must not be loaded.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

COMPILERS = ("cc", "gcc", "clang")
SAME_BITS = (
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
)  # flags that keep bits of operators
DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}  # macros of C files

logger = logging.getLogger("dist_asgd")
_warned: set[str] = set()


def compile_library(
    file: Path, flags: Sequence[str], purpose: str, kind: type[ctypes.CDLL] = ctypes.CDLL
) -> ctypes.CDLL | None:
    """Compiles one C file and loads it. Logs that at INFO, or at WARNING why it is not possible.

    Args:
        file: of this package.
        flags: for the compiler, besides those that make a shared library. OpenMP is used where the compiler has it.
        purpose: what the library does, for the log.
        kind: ``ctypes.PyDLL`` for a library that calls Python, and so must hold its lock.

    Returns:
        The library, or None if there is no compiler or it fails.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        warn_once(f"no C compiler found ({', '.join(COMPILERS)})")
        return None
    start = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="dist_asgd-") as folder:
            library = f"{folder}/library.so"
            command = [compiler, *flags, "-shared", "-fPIC", str(file), "-o", library, "-lm"]
            run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=60)
            if run([*command, "-fopenmp"]).returncode != 0:  # Apple's compiler has no OpenMP: one thread does the work
                run(command, check=True)
            loaded = kind(library)
    except (OSError, subprocess.SubprocessError) as error:
        warn_once(f"{compiler} failed", getattr(error, "stderr", None) or str(error))
        return None
    seconds = time.monotonic() - start
    logger.info(
        "compiled %s by %s in %.1f s for %s; results have the same bits without it",
        file.name,
        compiler,
        seconds,
        purpose,
    )
    return loaded


def warn_once(what: str, why: str = "") -> None:
    """Logs, once for each ``what``, that PyTorch's operators are used instead of a faster form, and why."""
    if what not in _warned:
        _warned.add(what)
        logger.warning("%s; PyTorch's operators are used instead: the same bits, but slower. %s", what, why)
