"""The plan of a load: which entries are read into which tensors, what mismatches, and what is called after reading."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dist_asgd.checkpoint.format.entries import SavedTensor, TensorEntry, dtype_name
from dist_asgd.checkpoint.state.mismatches import Problems, truncate
from dist_asgd.checkpoint.state.tensor_blocks import to_fill
from dist_asgd.checkpoint.state.tree import TreeNode, unflatten

MAX_VALUE = 60  # characters of a value in an error message

Callback = Callable[[], None]
DeferredValue = Callable[[], Any]  # returns a value that was read; to be called after the load has filled all tensors
MODULES, OPTIMIZERS, OTHERS = range(3)  # the order of callbacks: an optimizer's load_state_dict may look at parameters


@dataclass
class LoadPlan:
    """A load into live state, while it is being planned. Planning changes no live state and reads no tensor.

    Methods that find a mismatch add it to ``problems`` and go on, so that one error can name them all.
    """

    tensors: Mapping[str, SavedTensor]  # the checkpoint's tensors for this rank, by key
    values: Mapping[str, Any]  # the checkpoint's values for this rank, by key; an access may raise CheckpointError
    root: TreeNode  # of all the checkpoint's entries, including those that only other ranks have
    owners: Mapping[str, Sequence[int]]  # the ranks that have saved their own of an entry, by key
    strict: bool  # whether missing and unexpected entries are problems
    is_stock: bool  # whether DCP took the state apart: then all keys are strings, and empty containers are left out
    fills: dict[str, list[TensorEntry]] = field(default_factory=dict)  # the destinations of each tensor, by key
    problems: Problems = field(default_factory=Problems)
    callbacks: list[tuple[int, Callback]] = field(default_factory=list)  # with MODULES, OPTIMIZERS or OTHERS
    used: set[str] = field(default_factory=set)  # keys that live state has asked for; all others are unexpected

    def fill(self, key: str, tensor: Tensor) -> None:
        """Plans to read the entry into ``tensor``, which has the entry's global shape and dtype."""
        self.fills.setdefault(key, []).append(to_fill(key, tensor))

    def fits(self, key: str, tensor: Tensor, any_dtype: bool = False) -> bool:
        """Returns whether the checkpoint has a tensor of the shape and dtype of ``tensor``; adds problems if not.

        Marks the entry as used. ``any_dtype`` accepts every dtype.
        """
        self.used.add(key)
        saved = self.tensors.get(key)
        if saved is None:
            if key in self.values:
                found = f"found the value {truncate(repr(self.values[key]), MAX_VALUE)}"
                self.problems.wrong_dtype[key] = f"{found}, expected {_dtype_and_shape(tensor)}"
            else:
                self.note_missing(key, f"expected {_dtype_and_shape(tensor)}")
            return False
        if saved.shape != tuple(tensor.shape):
            self.problems.wrong_shape[key] = f"found {_dtype_and_shape(saved)}, expected {_dtype_and_shape(tensor)}"
        elif saved.dtype != tensor.dtype and not any_dtype:
            self.problems.wrong_dtype[key] = f"found {_dtype_and_shape(saved)}, expected {_dtype_and_shape(tensor)}"
        else:
            return True
        return False

    def note_missing(self, key: str, text: str) -> None:
        """Adds the problem ``text`` for an entry that the checkpoint lacks, if the load is strict."""
        if not self.strict:
            return
        own = next((ranks for name, ranks in self.owners.items() if f"{name}.".startswith(f"{key}.")), None)
        if own:
            text += (
                f". Ranks {list(own)} have saved their own, and this rank has none there: load it on as many ranks, in "
                "process groups like those at the save, or pass strict=False"
            )
        self.problems.missing[key] = text

    def owners_of_used(self) -> list[int]:
        """Returns the ranks that have saved their own of an entry that was used, ascending."""
        return sorted({rank for key in self.used & self.owners.keys() for rank in self.owners[key]})

    def has_all(self, node: TreeNode) -> bool:
        """Returns whether there are entries at ``node`` or below, and this rank has them all."""
        keys = list(node.entry_keys())
        return bool(keys) and all(key in self.tensors or key in self.values for key in keys)

    def read_subtree(
        self, node: TreeNode, tensor_for: Callable[[str, SavedTensor], Tensor | None]
    ) -> DeferredValue | None:
        """Plans to read all entries at ``node`` and below, and marks them as used.

        Args:
            tensor_for: returns the tensor to read an entry into, given its key; None where it has added a problem.

        Returns:
            What returns the nested state of the entries, once they were read. None where something is missing or wrong.
        """
        entries: dict[str, Any] = {}
        complete = True
        for key in node.entry_keys():
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
                self.note_missing(key, "only other ranks have it")
                complete = False
        return (lambda: unflatten(node, entries)) if complete else None

    def after_read(self, order: int, callback: Callback) -> None:
        """Plans to call ``callback`` after all tensors were read; ``order`` is MODULES, OPTIMIZERS or OTHERS."""
        self.callbacks.append((order, callback))

    def note_unexpected(self, names: set[str]) -> None:
        """Adds a problem for each unused entry below the top-level ``names``, if the load is strict."""
        for name in names if self.strict else ():
            for key in self.root.at((name,)).entry_keys():
                if key not in self.used:
                    found = _dtype_and_shape(self.tensors[key]) if key in self.tensors else "found a value"
                    self.problems.unexpected[key] = f"{found}, nothing here takes it"


def empty_cpu_tensor(key: str, saved: SavedTensor) -> Tensor:
    """Returns a new CPU tensor of the saved shape and dtype, not initialized; a ``tensor_for`` of ``read_subtree``."""
    return torch.empty(saved.shape, dtype=saved.dtype, device="cpu")


def _dtype_and_shape(tensor: Tensor | SavedTensor) -> str:
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
