"""The plan of a load: which entries are read into which tensors, what mismatches, and what is called after reading."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dist_asgd.checkpoint.format.entries import Block, SavedTensor, TensorEntry, dtype_name
from dist_asgd.checkpoint.state.mismatches import Problems, truncate
from dist_asgd.checkpoint.state.saved_names import renamed
from dist_asgd.checkpoint.state.tensor_blocks import is_sharded, to_fill
from dist_asgd.checkpoint.state.tree import Path, TreeNode, key_of, unflatten

# The smaller floats are left out: their values have a scale that a checkpoint may not know of.
_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
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
    strict: bool  # whether missing and unexpected entries, and other shapes, are problems
    cast: bool  # whether tensors may be of another dtype than the entry, if ``is_castable``
    prefix: str  # left out of the checkpoint's names of parameters and buffers; ends in a dot if there is one
    is_stock: bool  # whether DCP took the state apart: then all keys are strings, and empty containers are left out
    fills: dict[str, list[TensorEntry]] = field(default_factory=dict)  # the destinations of each tensor, by key
    problems: Problems = field(default_factory=Problems)
    skipped: dict[str, str] = field(default_factory=dict)  # entries of another shape, with a text, by key; not read
    casts: dict[str, str] = field(default_factory=dict)  # entries that are converted, with a text, by key
    callbacks: list[tuple[int, Callback]] = field(default_factory=list)  # with MODULES, OPTIMIZERS or OTHERS
    saved_names: dict[Path, dict[str, str]] = field(default_factory=dict)  # by path, of live names that were others
    refilled: set[int] = field(default_factory=set)  # the ``id`` of live dicts, lists and generators that were refilled
    used: set[str] = field(default_factory=set)  # keys that live state has asked for; all others are unexpected

    def fill(self, key: str, tensor: Tensor) -> None:
        """Plans to read the entry into ``tensor``, which has the entry's global shape, and may have another dtype."""
        self.fills.setdefault(key, []).append(to_fill(key, tensor))

    def fill_new(self, key: str, like: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Plans to read the entry into new tensors of ``dtype``, one for each block that this rank has of ``like``."""
        entry = to_fill(key, like)
        blocks = [Block(block.box, torch.empty_like(block.data, dtype=dtype)) for block in entry.blocks]
        self.fills.setdefault(key, []).append(TensorEntry(entry.shape, dtype, blocks))
        return [block.data for block in blocks]

    def fits(self, key: str, tensor: Tensor, any_dtype: bool = False) -> bool:
        """Returns whether the checkpoint has a tensor to read into ``tensor``; otherwise notes why not.

        What does not fit goes to ``problems``, or to ``skipped``. It must have the shape, and the dtype or one that is
        cast; ``any_dtype`` accepts every dtype. Marks the entry as used.
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
        text = f"found {_dtype_and_shape(saved)}, expected {_dtype_and_shape(tensor)}"
        if saved.shape != tuple(tensor.shape):
            self.note_shape(key, text)
            return False
        if saved.dtype == tensor.dtype or any_dtype:
            return True
        if not is_castable(saved.dtype, tensor.dtype):
            self.problems.wrong_dtype[key] = text
        elif not self.cast:
            self.problems.castable[key] = text
        else:
            self.note_cast(key, saved, tensor.dtype)
            return True
        return False

    def rename(self, node: TreeNode, live: Collection[str]) -> dict[str, str]:
        """Gives children of ``node``, named by saved names, their ``live`` names. Returns the saved ones of these.

        Raises:
            CheckpointError: two saved names become one.
        """
        names = renamed([name for name in node.children if isinstance(name, str)], live, self.prefix)
        node.children = {names.get(str(name), name): child for name, child in node.children.items()}
        return {new: old for old, new in names.items() if new != old}

    def names_of(self, path: Path, name: str) -> list[str]:
        """Returns the names by which optimizers of the checkpoint may know the parameter ``name`` of a module.

        Args:
            path: of the module, which has been planned.
        """
        own = (name, self.saved_names.get(path, {}).get(name, name))
        return [*own, *(key_of((*path, known)) for known in own)]

    def note_cast(self, key: str, saved: SavedTensor, dtype: torch.dtype) -> None:
        """Adds to ``casts`` that the entry is converted to ``dtype``."""
        self.casts[key] = f"{dtype_name(saved.dtype)} to {dtype_name(dtype)}"

    def note_shape(self, key: str, text: str) -> None:
        """Adds the problem ``text`` for an entry of another shape; if the load is not strict, the entry is skipped."""
        (self.problems.wrong_shape if self.strict else self.skipped)[key] = text

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

    def note_owned(self, key: str, ranks: Sequence[int]) -> None:
        """Adds a problem for an entry of which ``ranks`` have saved their own, where one for all ranks is expected."""
        self.problems.wrong_dtype[key] = (
            f"ranks {list(ranks)} have saved their own: load it into PerRank(...), or into an optimizer on process "
            "groups like those at the save"
        )

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
            tensor_for: returns the tensor to read an entry into, given its key, or a live one that takes the place of
                an entry that is skipped; None where it has added a problem.

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
                if key not in self.skipped:
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


def is_castable(saved: torch.dtype, live: torch.dtype) -> bool:
    """Returns whether a load may convert ``saved`` to ``live``: both are real, or both complex, of 16 bits or more."""
    return any(saved in kind and live in kind for kind in (_REAL, _COMPLEX))


def known_or_new(plan: LoadPlan, live: Mapping[str, Any]) -> Callable[[str, SavedTensor], Tensor]:
    """Returns a ``tensor_for`` of ``read_subtree`` for an object that is given what was saved by a method of its own.

    What shape its tensors have is the object's business. A live tensor, given by key, is read into if it has the saved
    shape and dtype. One that is sharded must have them, since only whole tensors could be made in its place.
    """

    def tensor_for(key: str, saved: SavedTensor) -> Tensor:
        known = live.get(key)
        if isinstance(known, Tensor) and is_sharded(known):
            plan.fits(key, known)
            return known
        if isinstance(known, Tensor) and tuple(known.shape) == saved.shape and known.dtype == saved.dtype:
            return known
        return empty_cpu_tensor(key, saved)

    return tensor_for


def _dtype_and_shape(tensor: Tensor | SavedTensor) -> str:
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
