"""What a load is going to do: which entries are read to where, and what is done with them afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dist_asgd.checkpoint.format.entries import SavedTensor, TensorEntry
from dist_asgd.checkpoint.state.mismatches import Problems
from dist_asgd.checkpoint.state.tensor_blocks import to_fill
from dist_asgd.checkpoint.state.tree import Path, TreeNode, key_of, nested

Finish = Callable[[], None]
MODULES, OPTIMIZERS, OTHERS = range(3)  # the order in which things are finished: optimizers may look at parameters


@dataclass
class LoadPlan:
    """A load in the making. Nothing live changes."""

    tensors: Mapping[str, SavedTensor]  # of the checkpoint
    values: Mapping[str, Any]  # of the checkpoint; an access may raise CheckpointError
    root: TreeNode  # of the checkpoint
    strict: bool
    is_stock: bool  # taken apart by DCP: all keys are strings, and what is empty is left out
    fills: dict[str, list[TensorEntry]] = field(default_factory=dict)
    problems: Problems = field(default_factory=Problems)
    finishers: list[tuple[int, Finish]] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def fill(self, key: str, tensor: Tensor) -> None:
        """The entry is to be read into ``tensor``, which has its shape and dtype."""
        self.fills.setdefault(key, []).append(to_fill(key, tensor))

    def fits(self, key: str, tensor: Tensor, any_dtype: bool = False) -> bool:
        """Whether the checkpoint has a tensor like ``tensor`` there. Notes what is wrong, and that it was asked for."""
        self.used.add(key)
        saved = self.tensors.get(key)
        if saved is None:
            if key in self.values:
                found = f"found the value {_short(self.values[key])}"
                self.problems.wrong_dtype[key] = f"{found}, expected {_described(tensor)}"
            else:
                self.lacks(key, f"expected {_described(tensor)}")
            return False
        if saved.shape != tuple(tensor.shape):
            self.problems.wrong_shape[key] = f"found {_described(saved)}, expected {_described(tensor)}"
        elif saved.dtype != tensor.dtype and not any_dtype:
            self.problems.wrong_dtype[key] = f"found {_described(saved)}, expected {_described(tensor)}"
        else:
            return True
        return False

    def lacks(self, key: str, text: str) -> None:
        if self.strict:
            self.problems.missing[key] = text

    def has(self, node: TreeNode) -> bool:
        """Whether the checkpoint has all entries at ``node`` and below for this rank, and any."""
        keys = list(node.entries())
        return bool(keys) and all(key in self.tensors or key in self.values for key in keys)

    def take(self, node: TreeNode, tensor_for: Callable[[str, SavedTensor], Tensor | None]) -> Callable[[], Any] | None:
        """All entries at ``node`` and below are read. Returns what makes nested state of them when they were.

        Args:
            tensor_for: the tensor to read an entry into, given its key; None where there was a problem.

        Returns:
            None where something is missing or wrong.
        """
        entries: dict[str, Any] = {}
        complete = True
        for key in node.entries():
            self.used.add(key)
            if key in self.tensors:
                tensor = tensor_for(key, self.tensors[key])
                if tensor is None:
                    complete = False
                    continue
                self.fill(key, tensor)
                entries[key] = tensor
            elif key in self.values:
                entries[key] = self.values[key]
            else:
                self.lacks(key, "only other ranks have it")
                complete = False
        return (lambda: nested(node, entries)) if complete else None

    def finish_with(self, order: int, finish: Finish) -> None:
        self.finishers.append((order, finish))

    def note_unexpected(self, names: set[str]) -> None:
        """Entries of the top-level ``names`` that nothing has asked for are unexpected."""
        for name in names if self.strict else ():
            for key in self.root.at((name,)).entries():
                if key not in self.used:
                    found = _described(self.tensors[key]) if key in self.tensors else "found a value"
                    self.problems.unexpected[key] = f"{found}, nothing here takes it"


def plain_tensor(key: str, saved: SavedTensor) -> Tensor:
    """A new tensor on the CPU."""
    return torch.empty(saved.shape, dtype=saved.dtype, device="cpu")


def missing(plan: LoadPlan, path: Path, what: str) -> None:
    plan.lacks(key_of(path), f"expected the state of {what}")


def _described(tensor: Tensor | SavedTensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
