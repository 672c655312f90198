"""Makes plain values out of pickles without running them: numbers, strings, bytes, containers, NumPy arrays, tensors.

A value in a checkpoint of torch.distributed.checkpoint is what ``torch.save`` pickled, mostly a number. `read_pickle`
of `checkpoint/stock/pickle_reader.py` reads the pickle as inert records. This module makes the value of these records,
and only for types that can be made without harm.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.format.json_values import MAX_DEPTH, decode
from dist_asgd.checkpoint.stock.pickle_reader import DTYPE_GLOBALS, DTYPES, Call, Global, read_pickle, short

_BUILTINS = ("__builtin__", "builtins")  # torch.save pickles by protocol 2, in which builtins have Python 2's module
_NUMPY = ("numpy._core.multiarray", "numpy.core.multiarray")  # the names since NumPy 2 and before NumPy 2
_ARRAYS = {f"{module}._reconstruct" for module in _NUMPY}
_SCALARS = {f"{module}.scalar" for module in _NUMPY}
_ALLOWED = DTYPE_GLOBALS | {
    *((module, name) for module in _BUILTINS for name in ("bytes", "set", "frozenset", "complex")),
    *((module, name) for module in _NUMPY for name in ("_reconstruct", "scalar")),
    *(("numpy", name) for name in ("ndarray", "dtype")),
    *(("torch", name) for name in ("Size", "device")),
    ("_codecs", "encode"),  # protocol 2 pickles bytes as a call of it
    ("collections", "OrderedDict"),
}


def plain_value(data: bytes, tensor_of: Callable[[Call], Tensor | None], tensors: frozenset[tuple[str, str]]) -> Any:
    """Returns the value that a pickle describes, without running anything.

    Args:
        data: the pickle.
        tensor_of: returns the tensor that a call would make, or None for a call that would make no tensor.
        tensors: (module, name) of each global that the pickle of a tensor may name.

    Raises:
        CheckpointError: the pickle is damaged, or holds a type that is not plain, which the message names.
    """
    found = read_pickle(data, _ALLOWED | tensors, persistent=True)
    try:
        return _PlainValueBuilder(10 * len(data) + 1000, tensor_of).value(found, 0)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the pickle is damaged, or made to do harm ({error})") from error


class _PlainValueBuilder:
    """Makes values of inert records, at most ``budget`` of them: a pickle may refer to one list any number of times."""

    def __init__(self, budget: int, tensor_of: Callable[[Call], Tensor | None]) -> None:
        self._left = budget
        self._tensor_of = tensor_of

    def value(self, found: Any, depth: int) -> Any:
        self._left -= 1
        if depth > MAX_DEPTH or self._left < 0:
            raise ValueError("containers refer to themselves, or to others very often")
        match found:
            case None | bool() | int() | float() | str():
                return found
            case tuple() | list():
                return type(found)([self.value(item, depth + 1) for item in found])
            case dict():
                return type(found)(
                    [(self.value(key, depth + 1), self.value(item, depth + 1)) for key, item in found.items()]
                )
            case Global(name) if name in DTYPES:
                return DTYPES[name]
            case Call():
                return self._object(found, depth + 1)
        raise _not_plain(found)

    def _object(self, call: Call, depth: int) -> Any:
        name, arguments = call.name, call.arguments
        match name.removeprefix("__builtin__.").removeprefix("builtins."), arguments, call.state:
            case "_codecs.encode", (str(text), "latin1"), None:
                return text.encode("latin1")
            case "bytes", (), None:
                return b""
            case "complex", (float(real), float(imaginary)), None:
                return complex(real, imaginary)
            case ("set" | "frozenset") as kind, (list(members),), None:
                # Tuples are refused as members: a deep one would overflow the stack of the hash function.
                if all(isinstance(member, str | int | float | None) for member in members):
                    return {"set": set, "frozenset": frozenset}[kind](members)
            case "torch.Size", (tuple(sizes),), None:
                return torch.Size(sizes)
            case "torch.device", (str(kind), *index), None:
                return torch.device(kind, *index)
            case _, (Global("numpy.ndarray"), _, _), (1, tuple(shape), Call() as dtype, False, data):
                if name in _ARRAYS:
                    return _numpy(dtype, list(shape), self.value(data, depth))
            case _, (Call("numpy.dtype") as dtype, data), None:
                if name in _SCALARS:
                    return _numpy(dtype, None, self.value(data, depth))
        tensor = self._tensor_of(call)
        if tensor is None:
            raise _not_plain(call)
        return tensor


def _numpy(dtype: Call, shape: list[int] | None, data: bytes) -> Any:
    """Returns the NumPy array of the bytes ``data``, or the NumPy scalar if ``shape`` is None."""
    match dtype.arguments, dtype.state:
        case (str(code), False, True), (3, "<" | "|" as order, None, None, None, int(), int(), int()):
            return decode({"#numpy": [order + code, shape, base64.b64encode(data).decode()]}, "in the pickle")
    raise _not_plain(dtype)


def _not_plain(found: Any) -> CheckpointError:
    return CheckpointError(
        f"it has {short(found)}, which is not plain data: if you trust where it comes from, pass trust=True"
    )
