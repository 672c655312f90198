"""Refuses calls that read, share or replace the memory of a tensor that stands for a piece and has no memory itself.

Such calls do not reach ``__torch_dispatch__``: torch would hand out a null pointer, and whoever reads from it ends the
process.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

_NEED_MEMORY = frozenset(
    {
        Tensor.__array__,
        Tensor.__dlpack__,
        Tensor.apply_,
        Tensor.data_ptr,
        Tensor.map_,
        Tensor.numpy,
        Tensor.share_memory_,
        Tensor.storage,
        Tensor.tolist,
        Tensor.untyped_storage,
    }
)


_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


def needs_memory(func: Any, args: Any) -> bool:
    """Returns whether ``func``, as ``__torch_function__`` gets it, asks for memory or gives a tensor other memory."""
    return func in _NEED_MEMORY or (func == _SET_DATA and args[0] is not args[1])


def name_of(func: Any) -> str:
    """Returns the name of ``func`` as users write it."""
    return "setting .data" if func == _SET_DATA else f"{func.__name__}()"
