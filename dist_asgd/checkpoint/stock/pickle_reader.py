"""Reads pickles without running them: turns whatever a pickle would import or call into an inert record.

[Note: pickles]
A pickle is a program for a stack machine, and the program may import and call anything. DCP's ``.metadata`` and the
descriptions of tensors in ``.distcp`` files are pickles, and a checkpoint may come from anywhere. `read_pickle` runs
the program on the pure-Python machine of the standard library, with only the instructions that describe data (the
module pickletools documents all instructions). Where pickle would import a class or function, the result has a
`Global`, which is its name. Where pickle would call a global or make an object of one, the result has a `Call`.
The other modules of `checkpoint/stock/` look for the records that they know and refuse others.

Memory grows with the length of the pickle and with nothing else: no length or index that the pickle states is
allocated before as many bytes were read. Time grows likewise, except where a pickle has chosen the numbers that are
the keys of a dict so that they collide.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

from dist_asgd.checkpoint.errors import CheckpointError


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """Name of a class, function or constant that pickle would import."""

    name: str  # as in "torch.float32"


@dataclass(slots=True, eq=False)
class Call:
    """Record of an object that pickle would make by a call of the global ``name`` with ``arguments``."""

    name: str  # as in "torch.Size"; or PERSISTENT
    arguments: tuple[Any, ...]
    state: Any = None  # the value that pickle would pass to the object's __setstate__


PERSISTENT = "persistent id"  # name of a `Call` that stands for an object stored outside of the pickle

DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
DTYPE_GLOBALS = frozenset(("torch", name.removeprefix("torch.")) for name in DTYPES)

_DAMAGE = (pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError, ValueError, struct.error)


def read_pickle(
    data: bytes, allowed: Collection[tuple[str, str]], *, trust: bool = False, persistent: bool = False
) -> Any:
    """Returns the data that a pickle describes. Imports and calls nothing, whatever the arguments are.

    The data consists of None, bools, numbers, strings, tuples, lists, dicts, OrderedDicts, `Global` and
    `Call`. Keys of dicts are numbers, strings, None or `Call`. Containers may be nested to any depth,
    may contain themselves, and may be referred to any number of times.

    Args:
        data: the pickle, of protocol 2 to 5. Bytes behind its end are ignored.
        allowed: (module, name) of each global that the pickle may name.
        trust: lets the pickle name other globals too, which become equally inert records.
        persistent: lets the pickle refer to objects that are stored outside of it.

    Raises:
        CheckpointError: the pickle is damaged, names a global that is not allowed, or has an instruction that does not
            describe data.
    """
    file = io.BytesIO(data)
    try:
        return _InertUnpickler(file, allowed, trust, persistent).load()
    except _DAMAGE as error:
        raise CheckpointError(
            f"the pickle is damaged, or made to do harm, at byte {file.tell()} of {len(data)} "
            f"({str(error) or 'it is cut off'})"
        ) from error


def short(value: object) -> str:
    """Returns a text of at most 80 characters for error messages, whatever the size and depth of the value."""
    if isinstance(value, Call | Global):
        text = f"a {value.name}"
    elif value is None or isinstance(value, bool | int | float | str):
        text = repr(value)
    else:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


class _Instructions(dict[int, Callable[[Any], None]]):
    """Methods of an unpickler by the code of their instruction; a code that is not there is refused."""

    def __missing__(self, code: int) -> Callable[[Any], None]:
        raise ValueError(f"{bytes([code])!r} is no instruction that describes data")


# The C implementation, pickle.Unpickler, cannot be used: a subclass of it cannot replace what REDUCE, NEWOBJ and BUILD
# do, nor leave out an instruction. The pure-Python one has been in the standard library since Python 3.0, with the
# table `dispatch` that is replaced here, but has no public name.
class _InertUnpickler(pickle._Unpickler):
    """Unpickler that makes a `Global` of each import and a `Call` of each call, and refuses most instructions."""

    stack: list[Any]  # this and the next two are of pickle._Unpickler, whose type stubs leave them out
    append: Callable[[Any], None]
    read: Callable[[int], bytes]

    def __init__(self, file: io.BytesIO, allowed: Collection[tuple[str, str]], trust: bool, persistent: bool) -> None:
        super().__init__(file)
        self._allowed = allowed
        self._trust = trust
        self._persistent = persistent

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed and not self._trust:
            raise CheckpointError(
                f"the pickle names {short(f'{module}.{name}')}, which a plain checkpoint of tensors does not contain: "
                "if you trust where it comes from, pass trust=True"
            )
        return Global(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Call:
        if not self._persistent:
            raise ValueError("names an object stored outside it")
        return Call(PERSISTENT, (pid,))

    def _skip_frame(self) -> None:
        self.read(8)  # the length of a frame: only of use to read ahead

    def _record_call(self) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        if not (isinstance(called, Global) and isinstance(arguments, tuple)):
            raise TypeError(f"calls {short(called)}")
        ordered = called.name == "collections.OrderedDict" and not arguments
        self.append(OrderedDict() if ordered else Call(called.name, arguments))

    def _record_state(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, Call) or target.state is not None:
            raise TypeError(f"sets the state of {short(target)}")
        target.state = state

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _set_items(self) -> None:
        self._update(self.pop_mark())  # type: ignore[attr-defined]

    def _update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise TypeError("sets items of no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Tuples are refused as keys: a deep one would overflow the stack of the hash function.
            if not isinstance(key, str | int | float | Call | None):
                raise TypeError(f"a dict's key is {short(key)}")
            target[key] = value

    # The methods that are taken over call nothing of the objects on the stack except for append and extend of lists.
    # Left out are instructions that call (INST, OBJ, NEWOBJ_EX, EXT1, EXT2, EXT4), that allocate what the pickle states
    # (BYTEARRAY8), and those that neither DCP nor torch.save writes.
    dispatch = _Instructions(
        {
            **{
                code[0]: pickle._Unpickler.dispatch[code[0]]
                for code in (
                    *(pickle.PROTO, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
                    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT),
                    *(pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.BINUNICODE8),
                    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
                    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT),
                    *(pickle.MEMOIZE, pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET),
                    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.BINPERSID),
                )
            },
            pickle.FRAME[0]: _skip_frame,
            pickle.REDUCE[0]: _record_call,
            pickle.NEWOBJ[0]: _record_call,
            pickle.BUILD[0]: _record_state,
            pickle.SETITEM[0]: _set_item,
            pickle.SETITEMS[0]: _set_items,
        }
    )
