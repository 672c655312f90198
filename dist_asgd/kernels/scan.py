"""How thousands of tensors lie, asked by one call.

A step has to know of every gradient that it has the parameter's shape, dtype, device and memory order, and its address.
Asked one attribute of one tensor after the other, 10,000 of them take 10 ms. scan.c, compiled when it is first needed,
asks PyTorch for all of that at once, through the C exchange API of DLPack (version 1.3, in PyTorch since 2.10).
"""

from __future__ import annotations

import ctypes
import functools
import operator
import subprocess
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_asgd.kernels.cpu import compiled, compiler
from dist_asgd.kernels.tensor_list import Gradients

SOURCE = Path(__file__).with_name("scan.c")
FLAGS = ("-O2", "-shared", "-fPIC")
CAPSULE = "__dlpack_c_exchange_api__"  # an attribute of torch.Tensor
DLPACK_MAJOR = 1
GRAD = "grad"  # held here, since kernels/scan.c is given its address


class _ExchangeApi(ctypes.Structure):
    """``DLPackExchangeAPI`` of dlpack.h."""

    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32)] + [
        (name, ctypes.c_void_p) for name in ("previous", "allocate", "from_object", "to_object", "view", "stream")
    ]


class _Python(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("view", "get", "append", "release")]


class _Expected(ctypes.Structure):
    _fields_ = [("dims", ctypes.c_void_p), ("like", ctypes.c_void_p), ("count", ctypes.c_int64)]


Functions = tuple[Callable[..., int], Callable[..., int]]  # look and look_at_gradients of kernels/scan.c


@dataclass(frozen=True, slots=True)
class ParameterPlaces:
    """Where parameters are, and their elements; ``seen`` is where kernels/scan.c last saw them and their gradients."""

    params: tuple[Tensor, ...]
    ids: array[int]
    addresses: array[int]
    seen: array[int]

    @classmethod
    def of(cls, params: tuple[Tensor, ...]) -> ParameterPlaces:
        seen = array("q", bytes(3 * 8 * len(params)))
        return cls(params, array("q", map(id, params)), array("q", map(Tensor.data_ptr, params)), seen)

    @property
    def hold(self) -> bool:
        return array("q", map(Tensor.data_ptr, self.params)) == self.addresses


class Look:
    """At tensors that are expected to lie in a certain way.

    Args:
        shapes, strides: of each.
        like: a tensor of their dtype and on their device.
        functions: None to ask each tensor.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        strides: Sequence[tuple[int, ...]],
        like: Tensor,
        functions: Functions | None,
    ) -> None:
        self._shapes, self._strides, self._like, self._functions = shapes, strides, like.new_empty(0), functions
        self._dims = array("q")
        for sizes, steps in zip(shapes, strides, strict=True):
            self._dims.extend((len(sizes), *(number for pair in zip(sizes, steps, strict=True) for number in pair)))
        self._expected = _Expected(_pointer(self._dims), id(self._like), len(shapes))
        self._singles = [position for position, sizes in enumerate(shapes) if set(sizes) <= {1}]

    @classmethod
    def of(cls, shapes: Sequence[tuple[int, ...]], strides: Sequence[tuple[int, ...]], like: Tensor) -> Look:
        return cls(shapes, strides, like, _functions())

    def at(self, tensors: Sequence[Tensor]) -> Gradients | None:
        """``tensors``, if all lie as expected."""
        if self._functions is None:
            return self._asked_each(tensors)
        ids = array("q", map(id, tensors))
        return self._plain(tensors, self._call(self._functions[0], _pointer(ids)))

    def at_gradients(self, places: ParameterPlaces) -> Gradients | None:
        """Those of parameters, if all are there and lie as expected, as the parameters do themselves, at ``places``."""
        if self._functions is None:
            return self._asked_each([param.grad for param in places.params]) if places.hold else None
        found: list[Tensor] = []
        where = map(_pointer, (places.ids, places.addresses, places.seen))
        return self._plain(found, self._call(self._functions[1], *where, id(GRAD), id(found)))

    def _call(self, function: Callable[..., int], *arguments: int) -> array[int] | None:
        """The addresses it writes. What ``arguments`` point to must live until it returns."""
        addresses = array("q", bytes(8 * len(self._shapes)))
        try:
            as_expected = function(ctypes.byref(self._expected), *arguments, _pointer(addresses))
        except Exception:  # for None, and what has no memory: whoever asks each of them can say more
            return None
        return addresses if as_expected else None

    def _plain(self, tensors: Sequence[Tensor], addresses: array[int] | None) -> Gradients | None:
        """If they have the values that are in memory.

        DLPack does not tell which are lazily negated. These are parts of complex numbers, two elements apart, so that
        only single elements can be taken for what they are not.
        """
        if addresses is None or self._like.is_complex():
            return None
        if list(map(type, tensors)).count(Tensor) < len(tensors) or any(tensors[k].is_neg() for k in self._singles):
            return None
        return Gradients(tensors, addresses)

    def _asked_each(self, tensors: Sequence[Any]) -> Gradients | None:
        try:
            # One after the other: thousands of shapes held at once would start Python's garbage collector.
            same = all(map(operator.eq, map(operator.attrgetter("shape"), tensors), self._shapes))
            same = same and all(map(operator.eq, map(Tensor.stride, tensors), self._strides))
            return Gradients.of(tensors) if same and are_plain(tensors, self._like) else None
        except (AttributeError, RuntimeError):  # None; sparse
            return None


def are_plain(tensors: Sequence[Tensor], like: Tensor) -> bool:
    """Whether they are contiguous, their memory has the values that they show, and dtype and device are of ``like``."""
    count = len(tensors)
    return (
        not like.is_complex()  # they may be lazily conjugated
        and list(map(type, tensors)).count(Tensor) == count
        and [tensor.dtype for tensor in tensors].count(like.dtype) == count
        and [tensor.device for tensor in tensors].count(like.device) == count
        and all(map(Tensor.is_contiguous, tensors))
        and not any(map(Tensor.is_neg, tensors))
    )


def _pointer(table: array[int]) -> int:
    return table.buffer_info()[0]


@functools.cache
def _functions() -> Functions | None:
    """None where there is no C compiler, or PyTorch has no exchange API."""
    capsule, found = getattr(Tensor, CAPSULE, None), compiler()
    if capsule is None or found is None:
        return None
    prototype = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    pointer_of = prototype(("PyCapsule_GetPointer", ctypes.pythonapi))
    api = _ExchangeApi.from_address(pointer_of(capsule, b"dlpack_exchange_api"))
    if api.major != DLPACK_MAJOR or not api.view:
        return None
    try:
        library = compiled(found, [*FLAGS, str(SOURCE)], ctypes.PyDLL)  # which holds Python's lock
        functions = (library.look, library.look_at_gradients)
    except (OSError, subprocess.SubprocessError, AttributeError):
        return None
    asked = (ctypes.pythonapi.PyObject_GetAttr, ctypes.pythonapi.PyList_Append, ctypes.pythonapi.Py_DecRef)
    python = ctypes.pointer(_Python(api.view, *(ctypes.cast(function, ctypes.c_void_p) for function in asked)))
    for function, count in zip(functions, (2, 6), strict=True):
        function.argtypes = [ctypes.POINTER(_Python), ctypes.POINTER(_Expected), *[ctypes.c_void_p] * count]
        function.restype = ctypes.c_int64
    bound = (functools.partial(functions[0], python), functools.partial(functions[1], python))
    return bound if _work(bound) else None


def _work(functions: Functions) -> bool:
    """Whether they see what they should. Asked before they are used."""
    params = tuple(torch.nn.Parameter(torch.zeros(shape)) for shape in ((3,), (2, 4), ()))
    shapes, strides = [tuple(param.shape) for param in params], [param.stride() for param in params]
    look, places = Look(shapes, strides, params[0].detach(), functions), ParameterPlaces.of(params)
    grads = [torch.zeros_like(param) for param in params]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    seen = look.at_gradients(places)
    if seen is None or not all(map(operator.is_, seen.tensors, grads)) or look.at(grads) is None:
        return False
    if seen.addresses != Gradients.of(grads).addresses:
        return False
    for other in (None, torch.zeros(4, 2).t(), torch.zeros(1, 4).expand(2, 4), torch.zeros(2, 4).to_sparse()):
        params[1].grad = other
        if look.at_gradients(places) is not None:
            return False
    wrong = (torch.zeros(2, 4, dtype=torch.int32), torch.zeros(8), torch.zeros(2, 5), torch.zeros(2, 4, device="meta"))
    params[1].grad, params[1].data = grads[1], torch.zeros(2, 4)
    return look.at_gradients(places) is None and all(look.at([grads[0], other, grads[2]]) is None for other in wrong)
