"""``ModelSizes``: the parameters and buffers of a model by shape and dtype, from shapes or from a function's model."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class ParameterSize:
    """A parameter without its values."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_trained: bool = True

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """A model without its values; tied parameters count once."""

    parameters: Sequence[ParameterSize]  # in the order of registration
    buffer_bytes: int = 0  # of persistent buffers

    def cast(self, dtype: torch.dtype) -> ModelSizes:
        """Returns the model with its floating-point parameters in ``dtype``."""
        cast = [replace(p, dtype=dtype) if p.dtype.is_floating_point else p for p in self.parameters]
        return replace(self, parameters=cast)


def sizes_of(module: nn.Module) -> ModelSizes:
    """Returns the sizes of a module, which may be on the meta device."""
    parameters = [
        ParameterSize(name, tuple(param.shape), param.dtype, param.requires_grad)
        for name, param in module.named_parameters()
    ]
    known = {id(param) for param in module.parameters()}
    kept: dict[int, Tensor] = {
        id(value): value for value in module.state_dict(keep_vars=True).values() if isinstance(value, Tensor)
    }
    return ModelSizes(parameters, sum(value.nbytes for key, value in kept.items() if key not in known))


def made_by(function: str) -> ModelSizes:
    """Returns the sizes of the model that ``"package.module:function"`` makes, on the meta device: without memory.

    The function is called without arguments; its module is looked for in the working directory, too.

    Raises:
        ValueError: there is no such function, it raises, or what it returns is no module with parameters.
    """
    path, _, name = function.partition(":")
    if not all(part.isidentifier() for part in (*path.split("."), name)):  # not told: it may be a URL with a password
        raise ValueError("the model is given neither as shapes nor as package:function")
    if "" not in sys.path:  # the command is a script, whose own directory stands there
        sys.path.insert(0, "")
    try:
        make = getattr(importlib.import_module(path), name)
        with torch.device("meta"):
            module = make()
    except Exception as error:
        raise ValueError(f"{function} made no model: {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module) or not any(True for _ in module.parameters()):
        raise ValueError(f"{function} returned {type(module).__name__}, and not an nn.Module with parameters")
    return sizes_of(module)
