"""Encodes Python values as JSON, exactly, and decodes them without running code that the JSON could name.

Values of JSON's own types stand for themselves. Every other value becomes an object with one member, whose name is
``#`` and the type: ``{"#tuple": [1, 2]}``. A dict becomes a JSON object only if all of its keys are strings that do not
begin with ``#``; any other dict becomes ``{"#dict": [[key, value], ...]}``. docs/checkpoint-format.md lists the types.
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import json
import re
import reprlib
import struct
import sys
from collections import Counter, OrderedDict, UserDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.format.entries import dtype_name
from dist_asgd.checkpoint.format.plain_types import BY_TAG, PlainType, plain_type_of

MAX_DEPTH = 100  # containers inside each other, far fewer than the json module can read
_INEXACT = 2**53  # integers from here on are written in hexadecimal, because many JSON readers take numbers for doubles
# NumPy's dtypes whose bytes mean one thing on every machine: long double is not among them.
_NUMPY_DTYPE = re.compile(r"\|b1|[<>|][iu][1248]|[<>]f[248]|[<>]c(8|16)|[<>|][SU]\d{1,9}|[<>][mM]8(\[\w{1,12}\])?")
# NotImplementedError (a RuntimeError): a path of Windows on another system. RuntimeError: the state of a generator.
_DAMAGE = (ValueError, TypeError, LookupError, ArithmeticError, MemoryError, RuntimeError, struct.error, ImportError)
_TORCH_DTYPES = {dtype_name(value): value for value in vars(torch).values() if type(value) is torch.dtype}


class Values(UserDict[str, Any]):
    """A dict whose values are decoded when they are asked for.

    So an entry that nobody takes may be damaged, or of a type that this process cannot decode.

    Args:
        found: the encoded values by key.
        make: called with an encoded value and its key; returns the value.
    """

    def __init__(self, found: Mapping[str, Any], make: Callable[[Any, str], Any]) -> None:
        super().__init__(found)
        self._make = make

    def __getitem__(self, key: str) -> Any:
        return self._make(self.data[key], key)


def encode(value: Any, name: str) -> Any:
    """Returns ``value`` in a form for ``json.dumps(..., allow_nan=False)``, from which ``decode`` makes it again.

    Values may have these types: None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict,
    OrderedDict, Counter, torch.Size, torch.dtype, NumPy's scalars and arrays, and those of `plain_types.py`. Instances
    of derived types are refused, because they would be decoded as the base type.

    Args:
        name: what errors call the value.

    Raises:
        TypeError: the value, or one in it, has another type, or containers are more than ``MAX_DEPTH`` deep.
    """
    return _encode(value, name, 0)


def decode(encoded: Any, name: str) -> Any:
    """Returns the value from which ``encode`` has made ``encoded``.

    Args:
        name: what errors call the value.

    Raises:
        CheckpointError: ``encoded`` is nothing that ``encode`` makes, or needs NumPy, which is not installed.
    """
    try:
        return _decode(encoded, 0)
    except _DAMAGE as error:
        text = reprlib.repr(encoded)  # shortened, and does not follow deep nesting
        raise CheckpointError(f"the value {name} is damaged, or of a newer version: {text} ({error})") from None


def _encode(value: Any, name: str, depth: int) -> Any:
    kind = type(value)
    if depth > MAX_DEPTH:
        raise TypeError(f"{name[:100]}... contains itself, or more than {MAX_DEPTH} containers in each other")
    if kind in (type(None), bool) or (kind is int and abs(value) < _INEXACT) or (kind is str and _is_unicode(value)):
        return value
    if kind is float and value - value == 0:  # a finite number, whose decimal form json writes exactly
        return value
    if kind is list:
        return [_encode(item, f"{name}[{index}]", depth + 1) for index, item in enumerate(value)]
    if kind is dict and all(type(key) is str and not key.startswith("#") and _is_unicode(key) for key in value):
        return {key: _encode(item, f"{name}[{key!r}]", depth + 1) for key, item in value.items()}
    if kind in (dict, OrderedDict, Counter):
        keys = [_encode(key, f"a key of {name}", depth + 1) for key in value]
        items = [_encode(item, f"{name}[{key!r}]", depth + 1) for key, item in value.items()]
        return {f"#{kind.__name__}": [list(pair) for pair in zip(keys, items, strict=True)]}
    if kind in (tuple, set, frozenset):
        items = [_encode(item, f"{name}[{index}]", depth + 1) for index, item in enumerate(value)]
        return {f"#{kind.__name__}": items if kind is tuple else sorted(items, key=json.dumps)}
    plain = plain_type_of(value)
    return _encode_atom(value, name) if plain is None else _encode_plain(plain, value, name, depth)


def _encode_plain(plain: PlainType, value: Any, name: str, depth: int) -> Any:
    try:
        parts = plain.parts(value)
    except ValueError as error:
        raise TypeError(f"{name} is {_described(value)}, which a checkpoint cannot hold: {error}") from None
    return {f"#{plain.tag}": [_encode(part, name, depth + 1) for part in parts]}


def _encode_atom(value: Any, name: str) -> Any:
    kind = type(value)
    if kind in _ENCODERS:
        return {f"#{kind.__name__}": _ENCODERS[kind](value)}
    numpy: Any = sys.modules.get("numpy")  # an array exists only where NumPy was imported; torch works without it
    if numpy is not None and _is_numpys(value, numpy):
        shape = list(value.shape) if kind is numpy.ndarray else None
        data = value.tobytes()[: value.nbytes]  # of an empty string NumPy gives a character
        return {"#numpy": [value.dtype.str, shape, base64.b64encode(data).decode()]}
    raise TypeError(f"{name} is {_described(value)}, which a checkpoint cannot hold: {_way_out(value)}")


def _way_out(value: Any) -> str:
    """Returns what to save instead of a value of a type that cannot be saved."""
    if isinstance(value, torch.Tensor):
        return "save list(x), or a dict whose keys are strings"
    if isinstance(value, enum.Enum):
        return "save x.value, and make the member of it again"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return "save dataclasses.asdict(x)"
    if isinstance(value, tuple) and getattr(type(value), "_fields", None) is not None:
        return "save x._asdict()"
    bases = (str, int, float, complex, bytes, list, tuple, dict, set, frozenset)
    base = next((base for base in bases if isinstance(value, base)), dict if isinstance(value, Mapping) else None)
    if base is not None:
        return f"it would come back as a {base.__name__}, so save {base.__name__}(x)"
    return (
        "give it as tensors, numbers, strings, lists, tuples, dicts or sets, or as an object that has state_dict() and "
        "load_state_dict()"
    )


def _is_numpys(value: Any, numpy: Any) -> bool:
    """Returns whether a value is an array or a scalar of NumPy's own types that its bytes and dtype express."""
    kind = type(value)
    if kind is not numpy.ndarray and not (isinstance(value, numpy.generic) and kind is value.dtype.type):
        return False
    # Other packages register dtypes, whose text may be that of a dtype of NumPy.
    return _NUMPY_DTYPE.fullmatch(value.dtype.str) is not None and numpy.dtype(value.dtype.str) == value.dtype


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "a tensor in a tuple, a deque, a set, or a dict with keys that are no strings"
    return f"of type {type(value).__module__}.{type(value).__qualname__}"


def _is_unicode(text: str) -> bool:
    """Returns whether a text has no surrogates: JSON would join two of them into one character."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def _decode(encoded: Any, depth: int) -> Any:
    if depth > 2 * MAX_DEPTH:
        raise ValueError("too many containers in each other")
    if encoded is None or type(encoded) in (bool, int, float, str):
        return encoded
    if type(encoded) is list:
        return [_decode(item, depth + 1) for item in encoded]
    if type(encoded) is not dict:
        raise TypeError("no JSON")
    tags = [key for key in encoded if key.startswith("#")]
    if not tags:
        return {key: _decode(item, depth + 1) for key, item in encoded.items()}
    (tag,) = encoded
    content = encoded[tag]
    if tag in _CONTAINERS:
        if type(content) is not list:
            raise TypeError("not a list")
        return _CONTAINERS[tag](_decode(item, depth + 1) for item in content)
    if tag[1:] in BY_TAG:
        return BY_TAG[tag[1:]].make(*[_decode(part, depth + 1) for part in content])
    return _ATOMS[tag](content)


def _size(content: Any) -> torch.Size:
    if type(content) is not list or not all(type(size) is int for size in content):
        raise TypeError("not a list of int")
    return torch.Size(content)


def _decode_numpy(content: Any) -> Any:
    import numpy

    dtype, shape, data = content  # shape None stands for a scalar
    if not _NUMPY_DTYPE.fullmatch(dtype) or not (shape is None or all(type(size) is int for size in shape)):
        raise ValueError("not what NumPy has")
    raw = base64.b64decode(data, validate=True)
    if shape is None and dtype[1] in "SU":
        return _numpy_text(dtype, raw)
    flat = numpy.frombuffer(raw, numpy.dtype(dtype))
    if shape is None:
        (scalar,) = flat
        return scalar
    if any(size < 0 for size in shape):
        raise ValueError("a negative size")
    return flat.reshape(shape).copy()


def _numpy_text(dtype: str, raw: bytes) -> Any:
    """Returns a scalar string, which may be empty or end in NULs: NumPy's arrays cannot tell these from padding."""
    import numpy

    size = int(dtype[2:]) * (4 if dtype[1] == "U" else 1)
    if len(raw) < size:
        raise ValueError(f"{len(raw)} bytes of {size}")
    if dtype[1] == "S":
        return numpy.bytes_(raw[:size])
    return numpy.str_(raw[:size].decode("utf-32-be" if dtype[0] == ">" else "utf-32-le", "surrogatepass"))


_ENCODERS: Mapping[type, Callable[[Any], Any]] = {
    int: hex,
    float: lambda value: struct.pack(">d", value).hex(),
    complex: lambda value: struct.pack(">dd", value.real, value.imag).hex(),
    str: lambda value: value.encode("utf-8", "surrogatepass").hex(),
    bytes: lambda value: base64.b64encode(value).decode(),
    torch.Size: list,
    torch.dtype: dtype_name,
}
_CONTAINERS: Mapping[str, Callable[[Any], Any]] = {
    "#dict": dict,
    "#OrderedDict": OrderedDict,
    "#Counter": lambda pairs: Counter(dict(pairs)),
    "#tuple": tuple,
    "#set": set,
    "#frozenset": frozenset,
}
_ATOMS: Mapping[str, Callable[[Any], Any]] = {
    "#int": lambda text: int(text, 16),
    "#float": lambda text: struct.unpack(">d", bytes.fromhex(text))[0],
    "#complex": lambda text: complex(*struct.unpack(">dd", bytes.fromhex(text))),
    "#str": lambda text: bytes.fromhex(text).decode("utf-8", "surrogatepass"),
    "#bytes": lambda text: base64.b64decode(text, validate=True),
    "#Size": _size,
    "#dtype": _TORCH_DTYPES.__getitem__,
    "#numpy": _decode_numpy,
}
