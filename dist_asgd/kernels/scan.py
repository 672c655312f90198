"""Reads the memory layout of thousands of tensors by one call of C.

A step must know that every gradient has the shape, dtype, device and memory order of its parameter, and where it lies.
Reading one attribute of one tensor after the other takes 10 ms for 10,000 tensors. kernels/scan.c, compiled at first
use, reads all of them at once through the C exchange API of DLPack (version 1.3, in PyTorch since 2.10).
"""

from __future__ import annotations

import ctypes
import functools
import operator
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_asgd.c_library import compile_library
from dist_asgd.kernels.tensor_list import Gradients, pointer_to

CAPSULE = "__dlpack_c_exchange_api__"  # an attribute of torch.Tensor
DLPACK_MAJOR = 1
GRAD = "grad"  # kernels/scan.c is given the address of this object, so it must live as long as the module


class _ExchangeApi(ctypes.Structure):
    """``DLPackExchangeAPI`` of dlpack.h."""

    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32)] + [
        (name, ctypes.c_void_p) for name in ("previous", "allocate", "from_object", "to_object", "view", "stream")
    ]


class _Python(ctypes.Structure):
    """``Python`` of kernels/scan.c."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("view", "get", "append", "release")]


class _Expected(ctypes.Structure):
    """``Expected`` of kernels/scan.c."""

    _fields_ = [("dims", ctypes.c_void_p), ("like", ctypes.c_void_p), ("count", ctypes.c_int64)]


Functions = tuple[Callable[..., int], Callable[..., int]]  # scan and scan_gradients of kernels/scan.c


@dataclass(frozen=True, slots=True)
class ParameterPlaces:
    """Memory addresses of parameters.

    Attributes:
        params: the parameters.
        ids: the address of each Python object.
        addresses: the address of each parameter's first element.
        seen: three addresses for each parameter that kernels/scan.c remembers from one scan to the next.
        pointers: where ``ids``, ``addresses`` and ``seen`` lie in memory.
    """

    params: tuple[Tensor, ...]
    ids: array[int]
    addresses: array[int]
    seen: array[int]
    pointers: tuple[int, int, int]

    @classmethod
    def of(cls, params: tuple[Tensor, ...]) -> ParameterPlaces:
        """Reads the addresses of ``params``."""
        seen = array("q", bytes(3 * 8 * len(params)))
        ids, addresses = array("q", map(id, params)), array("q", map(Tensor.data_ptr, params))
        return cls(params, ids, addresses, seen, (pointer_to(ids), pointer_to(addresses), pointer_to(seen)))

    @property
    def are_current(self) -> bool:
        """Whether the elements of every parameter still lie at its address."""
        return array("q", map(Tensor.data_ptr, self.params)) == self.addresses


class LayoutScan:
    """Compares tensors with expected shapes, strides, dtype and device, and reads their addresses.

    Args:
        shapes: the expected shape of each tensor.
        strides: the expected strides of each tensor, in elements.
        like: a tensor of the expected dtype and device.
        functions: the compiled functions; None to read each attribute of each tensor by Python.
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
        self._expected = _Expected(pointer_to(self._dims), id(self._like), len(shapes))
        self._pointer = ctypes.addressof(self._expected)
        self._blank, self._is_complex = array("q", bytes(8 * len(shapes))), like.is_complex()
        self._singles = [position for position, sizes in enumerate(shapes) if set(sizes) <= {1}]

    @classmethod
    def of(cls, shapes: Sequence[tuple[int, ...]], strides: Sequence[tuple[int, ...]], like: Tensor) -> LayoutScan:
        """Makes a scan by the compiled functions where they can be had. The first call runs the C compiler."""
        return cls(shapes, strides, like, _functions())

    def scan(self, tensors: Sequence[Tensor]) -> Gradients | None:
        """Returns ``tensors`` and their addresses if each is as expected and no subclass of Tensor; otherwise None."""
        if self._functions is None:
            return self._scan_by_python(tensors)
        ids = array("q", map(id, tensors))
        return self._if_plain(tensors, self._call(self._functions[0], pointer_to(ids)))

    def scan_gradients(self, places: ParameterPlaces) -> Gradients | None:
        """Returns the gradients of parameters and their addresses, or None if anything is not as expected.

        Every parameter must have a gradient. Parameter and gradient must have the expected layout, and the parameter
        must lie at its address in ``places``.
        """
        if self._functions is None:
            return self._scan_by_python([param.grad for param in places.params]) if places.are_current else None
        found: list[Tensor] = []
        return self._if_plain(found, self._call(self._functions[1], *places.pointers, id(GRAD), id(found)))

    def _call(self, function: Callable[..., int], *arguments: int) -> array[int] | None:
        """Returns the addresses that ``function`` writes, or None if a tensor is not as expected.

        The objects that ``arguments`` point to must live until ``function`` returns.
        """
        addresses = self._blank[:]
        try:
            as_expected = function(self._pointer, *arguments, addresses.buffer_info()[0])
        except Exception:  # a tensor is None or has no memory; the checks that follow a failed scan say which
            return None
        return addresses if as_expected else None

    def _if_plain(self, tensors: Sequence[Tensor], addresses: array[int] | None) -> Gradients | None:
        """Returns ``tensors`` and ``addresses`` if memory holds the values that the tensors show; otherwise None.

        DLPack does not tell whether a tensor is lazily negated. Such a tensor is a part of a complex one, with a stride
        of two elements, so the strides already refuse it unless it has a single element.
        """
        if addresses is None or self._is_complex or list(map(type, tensors)).count(Tensor) < len(tensors):
            return None
        if self._singles and any(tensors[k].is_neg() for k in self._singles):
            return None
        return Gradients(tensors, addresses)

    def _scan_by_python(self, tensors: Sequence[Any]) -> Gradients | None:
        try:
            # One shape at a time: thousands of shapes held at once would start Python's garbage collector.
            same = all(map(operator.eq, map(operator.attrgetter("shape"), tensors), self._shapes))
            same = same and all(map(operator.eq, map(Tensor.stride, tensors), self._strides))
            return Gradients.of(tensors) if same and are_plain(tensors, self._like) else None
        except (AttributeError, RuntimeError):  # a tensor is None, or sparse
            return None


def are_plain(tensors: Sequence[Tensor], like: Tensor) -> bool:
    """Returns whether all are contiguous, of ``like``'s dtype and device, no subclasses, and not lazily negated."""
    count = len(tensors)
    return (
        not like.is_complex()  # a complex tensor may be lazily conjugated
        and list(map(type, tensors)).count(Tensor) == count
        and [tensor.dtype for tensor in tensors].count(like.dtype) == count
        and [tensor.device for tensor in tensors].count(like.device) == count
        and all(map(Tensor.is_contiguous, tensors))
        and not any(map(Tensor.is_neg, tensors))
    )


@functools.cache
def _functions() -> Functions | None:
    """Compiles kernels/scan.c; returns None without PyTorch's exchange API or a C compiler, or if checks fail."""
    capsule = getattr(Tensor, CAPSULE, None)
    if capsule is None:
        return None
    prototype = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    pointer_of = prototype(("PyCapsule_GetPointer", ctypes.pythonapi))
    api = _ExchangeApi.from_address(pointer_of(capsule, b"dlpack_exchange_api"))
    if api.major != DLPACK_MAJOR or not api.view:
        return None
    file, purpose = Path(__file__).with_name("scan.c"), "the check of all gradients by one call"
    library = compile_library(file, ["-O2"], purpose, ctypes.PyDLL)
    if library is None:
        return None
    functions = (library.scan, library.scan_gradients)
    callbacks = (ctypes.pythonapi.PyObject_GetAttr, ctypes.pythonapi.PyList_Append, ctypes.pythonapi.Py_DecRef)
    python = ctypes.pointer(_Python(api.view, *(ctypes.cast(function, ctypes.c_void_p) for function in callbacks)))
    for function, count in zip(functions, (2, 6), strict=True):
        function.argtypes = [ctypes.POINTER(_Python), *[ctypes.c_void_p] * (1 + count)]
        function.restype = ctypes.c_int64
    bound = (functools.partial(functions[0], python), functools.partial(functions[1], python))
    return bound if _see_layouts(bound) else None


def _see_layouts(functions: Functions) -> bool:
    """Returns whether the compiled functions accept expected layouts and refuse others on this machine."""
    zeros = functools.partial(torch.zeros, device="cpu")
    params = tuple(torch.nn.Parameter(zeros(shape)) for shape in ((3,), (2, 4), ()))
    shapes, strides = [tuple(param.shape) for param in params], [param.stride() for param in params]
    scan, places = LayoutScan(shapes, strides, params[0].detach(), functions), ParameterPlaces.of(params)
    grads = [torch.zeros_like(param) for param in params]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    seen = scan.scan_gradients(places)
    if seen is None or not all(map(operator.is_, seen.tensors, grads)) or scan.scan(grads) is None:
        return False
    if seen.addresses != Gradients.of(grads).addresses:
        return False
    for other in (None, zeros(4, 2).t(), zeros(1, 4).expand(2, 4), zeros(2, 4).to_sparse()):
        params[1].grad = other
        if scan.scan_gradients(places) is not None:
            return False
    wrong = (zeros(2, 4, dtype=torch.int32), zeros(8), zeros(2, 5), torch.empty(2, 4, device="meta"))
    params[1].grad, params[1].data = grads[1], zeros(2, 4)
    return scan.scan_gradients(places) is None and not any(scan.scan([grads[0], other, grads[2]]) for other in wrong)
