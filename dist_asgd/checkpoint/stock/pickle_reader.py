"""Reads pickles without running them: what a pickle would import or call becomes an inert record of it.

[Note: pickles]
A pickle is a program for a stack machine, which may import and call anything. DCP's ``.metadata`` and the
descriptions of tensors are pickles, and a checkpoint may come from anywhere. So this machine has only the
instructions that describe data (pickletools documents them all); where pickle would import a class or function it
makes a ``Global``, its name, and where pickle would call it or make an object of it a ``Node``. Its readers look for
the nodes they know. Time and memory grow with the length of the pickle and nothing else: no length or index that
the pickle states is allocated before as many bytes were seen.
"""

from __future__ import annotations

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
    """Something that pickle would import."""

    name: str  # as in "torch.float32"


@dataclass(slots=True, eq=False)
class Node:
    """An object that pickle would make by calling the global ``name`` with ``arguments``."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None  # what pickle would pass to its __setstate__


PERSISTENT = "persistent id"  # name of the nodes that stand for objects stored outside the pickle

DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
DTYPE_GLOBALS = frozenset(("torch", name.removeprefix("torch.")) for name in DTYPES)


def read_pickle(
    data: bytes, allowed: Collection[tuple[str, str]], *, trust: bool = False, persistent: bool = False
) -> Any:
    """What a pickle describes: None, bools, numbers, strings, tuples, lists, dicts, Globals and Nodes of these.

    Args:
        data: the pickle, of protocol 2 to 5.
        allowed: (module, name) of each global it may name.
        trust: let it name others too. They are as inert.
        persistent: let it name objects that are stored outside it.

    Raises CheckpointError when it is damaged, names another global or does what describes no data.
    """
    return _Machine(data, allowed, trust, persistent).run()


def short(value: object) -> str:
    """For messages: a value out of a pickle may be of any size and depth."""
    if isinstance(value, Node | Global):
        return f"a {value.name}"
    if value is None or isinstance(value, bool | int | float | str):
        text = repr(value)
        return text if len(text) <= 80 else text[:77] + "..."
    return f"a {type(value).__name__}"


class _Machine:
    def __init__(self, data: bytes, allowed: Collection[tuple[str, str]], trust: bool, persistent: bool) -> None:
        self.data = data
        self.at = 0
        self.allowed = allowed
        self.trust = trust
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}  # a dict: the pickle chooses the indices

    def run(self) -> Any:
        data, steps = self.data, _STEPS
        try:
            while (code := data[self.at]) != _STOP:
                step = steps.get(code)
                if step is None:
                    raise ValueError(f"{bytes([code])!r} is no instruction that describes data")
                self.at += 1
                step(self)
            return self.stack[-1]
        except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
            raise CheckpointError(
                f"the pickle is damaged, or made to do harm, at byte {self.at} of {len(data)} ({error})"
            ) from error

    def take(self, count: int) -> bytes:
        start = self.at
        self.at = stop = start + count
        if stop > len(self.data):
            raise ValueError(f"{count} bytes expected")
        return self.data[start:stop]

    def line(self) -> str:
        stop = self.data.index(b"\n", self.at)
        text = self.data[self.at : stop].decode()
        self.at = stop + 1
        return text

    def pop_marked(self) -> list[Any]:
        items = self.stack
        self.stack = self.marked.pop()
        return items

    def push_global(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError("a global without a name")
        if (module, name) not in self.allowed and not self.trust:
            raise CheckpointError(
                f"the pickle names {short(f'{module}.{name}')}, which a plain checkpoint of tensors does not contain: "
                "if you trust where it comes from, pass trust=True"
            )
        self.stack.append(Global(f"{module}.{name}"))


def _push(value_of: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        machine.stack.append(value_of(machine))

    return step


def _unpack(code: str) -> Callable[[_Machine], Any]:
    layout = struct.Struct(code)

    def value(machine: _Machine) -> Any:
        (number,) = layout.unpack_from(machine.data, machine.at)
        machine.at += layout.size
        return number

    return value


def _text(length_of: Callable[[_Machine], int]) -> Callable[[_Machine], str]:
    return lambda machine: machine.take(length_of(machine)).decode("utf-8", "surrogatepass")  # as pickle writes them


def _skip(count: int) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        machine.take(count)

    return step


def _put(index_of: Callable[[_Machine], int]) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        machine.memo[index_of(machine)] = machine.stack[-1]

    return step


def _get(index_of: Callable[[_Machine], int]) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        machine.stack.append(machine.memo[index_of(machine)])

    return step


def _memoize(machine: _Machine) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _mark(machine: _Machine) -> None:
    machine.marked.append(machine.stack)
    machine.stack = []


def _tuple(machine: _Machine) -> None:
    items = machine.pop_marked()
    machine.stack.append(tuple(items))


def _tuple_of(count: int) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        items = tuple(machine.stack[-count:])
        if len(items) < count:
            raise IndexError(f"{count} items expected")
        machine.stack[-count:] = [items]

    return step


def _append(machine: _Machine) -> None:
    _extend(machine, [machine.stack.pop()])


def _appends(machine: _Machine) -> None:
    _extend(machine, machine.pop_marked())


def _extend(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if not isinstance(target, list):
        raise TypeError("appends to no list")
    target += items


def _set_item(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _update(machine, [key, value])


def _set_items(machine: _Machine) -> None:
    _update(machine, machine.pop_marked())


def _update(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if not isinstance(target, dict):
        raise TypeError("sets items of no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Not tuples: a deep one would overflow the stack of the hash function.
        if not isinstance(key, str | int | float | Node | None):
            raise TypeError(f"a dict's key is {short(key)}")
        target[key] = value


def _global(machine: _Machine) -> None:
    module = machine.line()
    machine.push_global(module, machine.line())


def _stack_global(machine: _Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.push_global(module, name)


def _call(machine: _Machine) -> None:
    arguments, called = machine.stack.pop(), machine.stack.pop()
    if not (isinstance(called, Global) and isinstance(arguments, tuple)):
        raise TypeError(f"calls {short(called)}")
    ordered = called.name == "collections.OrderedDict" and not arguments
    machine.stack.append(OrderedDict() if ordered else Node(called.name, arguments))


def _build(machine: _Machine) -> None:
    state, target = machine.stack.pop(), machine.stack[-1]
    if not isinstance(target, Node) or target.state is not None:
        raise TypeError(f"sets the state of {short(target)}")
    target.state = state


def _persistent(machine: _Machine) -> None:
    if not machine.persistent:
        raise ValueError("names an object stored outside it")
    machine.stack.append(Node(PERSISTENT, (machine.stack.pop(),)))


_byte, _uint16, _uint32, _uint64 = (_unpack(code) for code in ("<B", "<H", "<I", "<Q"))
_STOP = pickle.STOP[0]
_STEPS: dict[int, Callable[[_Machine], None]] = {
    code[0]: step
    for code, step in (
        (pickle.PROTO, _skip(1)),
        (pickle.FRAME, _skip(8)),
        (pickle.NONE, _push(lambda machine: None)),
        (pickle.NEWTRUE, _push(lambda machine: True)),
        (pickle.NEWFALSE, _push(lambda machine: False)),
        (pickle.BININT, _push(_unpack("<i"))),
        (pickle.BININT1, _push(_byte)),
        (pickle.BININT2, _push(_uint16)),
        (pickle.LONG1, _push(lambda machine: pickle.decode_long(machine.take(_byte(machine))))),
        (pickle.BINFLOAT, _push(_unpack(">d"))),
        (pickle.SHORT_BINUNICODE, _push(_text(_byte))),
        (pickle.BINUNICODE, _push(_text(_uint32))),
        (pickle.BINUNICODE8, _push(_text(_uint64))),
        (pickle.EMPTY_TUPLE, _push(lambda machine: ())),
        (pickle.EMPTY_LIST, _push(lambda machine: [])),
        (pickle.EMPTY_DICT, _push(lambda machine: {})),
        (pickle.MARK, _mark),
        (pickle.TUPLE, _tuple),
        (pickle.TUPLE1, _tuple_of(1)),
        (pickle.TUPLE2, _tuple_of(2)),
        (pickle.TUPLE3, _tuple_of(3)),
        (pickle.APPEND, _append),
        (pickle.APPENDS, _appends),
        (pickle.SETITEM, _set_item),
        (pickle.SETITEMS, _set_items),
        (pickle.MEMOIZE, _memoize),
        (pickle.BINPUT, _put(_byte)),
        (pickle.LONG_BINPUT, _put(_uint32)),
        (pickle.BINGET, _get(_byte)),
        (pickle.LONG_BINGET, _get(_uint32)),
        (pickle.GLOBAL, _global),
        (pickle.STACK_GLOBAL, _stack_global),
        (pickle.NEWOBJ, _call),
        (pickle.REDUCE, _call),
        (pickle.BUILD, _build),
        (pickle.BINPERSID, _persistent),
    )
}
