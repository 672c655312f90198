"""Takes values of the standard library, of torch and of NumPy apart into plainer values, and makes them again.

``format/json_values.py`` encodes the parts. Nothing that a file names is imported or called: the types are those of the
list here, and the parts are validated before a value is made of them.
"""

from __future__ import annotations

import functools
import operator
import pathlib
import random
import sys
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction
from typing import Any

import torch

# What a defaultdict may make, by name.
_FACTORIES: Mapping[str, Callable[[], Any] | None] = {
    "": None,
    **{kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)},
}
# NumPy's bit generators, each with the path in its state of a number that is an index, and the largest it may be.
_BIT_GENERATORS: Mapping[str, tuple[tuple[str, ...], int]] = {
    "MT19937": (("state", "pos"), 624),
    "PCG64": ((), 0),
    "PCG64DXSM": ((), 0),
    "Philox": (("buffer_pos",), 4),
    "SFC64": ((), 0),
}
_MAX_POOL = 1024  # words of a SeedSequence's pool; NumPy's default is 4


@dataclass(frozen=True, slots=True)
class PlainType:
    """A type whose values consist of plainer values.

    Attributes:
        tag: names the type in files.
        parts: returns what a value consists of; raises ``ValueError``, with the way out, for one that has more to it.
        make: returns the value of the given parts; raises any ``Exception`` for parts that ``parts`` never returns.
    """

    tag: str
    parts: Callable[[Any], list[Any]]
    make: Callable[..., Any]


def plain_type_of(value: object) -> PlainType | None:
    """Returns how ``value`` is taken apart, or None if its type is not in the list. Derived types are not."""
    kind = type(value)
    if kind.__module__.partition(".")[0] == "numpy" and kind.__name__ in ("Generator", "RandomState"):
        numpy: Any = sys.modules["numpy"]
        if kind in (numpy.random.Generator, numpy.random.RandomState):
            return BY_TAG[f"numpy.{kind.__name__}"]
    return _BY_TYPE.get(kind)


def _checked(value: Any, *kinds: type) -> Any:
    if type(value) not in kinds:
        raise TypeError(f"found a {type(value).__name__}, expected {' or '.join(kind.__name__ for kind in kinds)}")
    return value


def _numbers(kind: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that calls ``kind`` with whole numbers, and raises ``TypeError`` for other arguments."""
    return lambda *parts: kind(*[_checked(part, int) for part in parts])


def _text(kind: Callable[[str], Any]) -> Callable[[Any], Any]:
    """Returns a function that calls ``kind`` with a string, and raises ``TypeError`` for another argument."""
    return lambda text: kind(_checked(text, str))


def _zone_parts(zone: tzinfo | None) -> list[Any] | None:
    """Returns the offset of a zone in (days, seconds, microseconds), and its name if it was given one."""
    if zone is None:
        return None
    if type(zone) is not timezone:
        raise ValueError(
            f"its time zone is a {type(zone).__qualname__}: save it in UTC, x.astimezone(datetime.timezone.utc), and "
            "the zone's name beside it"
        )
    offset = zone.utcoffset(None)
    name = zone.tzname(None)
    return [offset.days, offset.seconds, offset.microseconds, None if name == timezone(offset).tzname(None) else name]


def _zone(parts: Any) -> timezone | None:
    if parts is None:
        return None
    days, seconds, microseconds, name = _checked(parts, list)
    offset = _numbers(timedelta)(days, seconds, microseconds)
    return timezone(offset) if name is None else timezone(offset, _checked(name, str))


def _time_parts(value: datetime | time) -> list[Any]:
    return [value.replace(tzinfo=None, fold=0).isoformat(), value.fold, _zone_parts(value.tzinfo)]


def _time_of(kind: type[datetime] | type[time]) -> Callable[..., Any]:
    def make(text: Any, fold: Any, zone: Any) -> Any:
        found: Any = kind.fromisoformat(_checked(text, str))
        return found.replace(fold=_checked(fold, int), tzinfo=_zone(zone))

    return make


def _deque(items: Any, most: Any) -> deque[Any]:
    return deque(_checked(items, list), None if most is None else _checked(most, int))


def _defaultdict_parts(value: defaultdict[Any, Any]) -> list[Any]:
    for name, factory in _FACTORIES.items():
        if value.default_factory is factory:
            return [name, dict(value)]
    raise ValueError(f"what it makes is a {value.default_factory!r}, which only code can name: save dict(x)")


def _defaultdict(name: Any, items: Any) -> defaultdict[Any, Any]:
    return defaultdict(_FACTORIES[name], _checked(items, dict))


def _torch_generator(device: Any, state: Any) -> torch.Generator:
    generator = torch.Generator(_checked(device, str))
    return generator.set_state(torch.frombuffer(bytearray(_checked(state, bytes)), dtype=torch.uint8))


def _random(*state: Any) -> random.Random:
    generator = random.Random()
    generator.setstate(state)
    return generator


def _numpy_generator_parts(value: Any) -> list[Any]:
    bits = value.bit_generator
    _check_bit_generator(bits.state)
    seeds: Any = getattr(bits, "seed_seq", None)  # NumPy has it from 1.25 on
    is_plain = type(seeds) is sys.modules["numpy"].random.SeedSequence
    return [bits.state, dict(seeds.state) if is_plain else None]


def _numpy_generator(state: Any, seeds: Any) -> Any:
    import numpy

    _check_bit_generator(state)
    if seeds is not None and _checked(seeds["pool_size"], int) > _MAX_POOL:
        raise ValueError(f"the pool of the seeds has {seeds['pool_size']} words, expected at most {_MAX_POOL}")
    sequence = None if seeds is None else numpy.random.SeedSequence(**seeds)
    generator = numpy.random.Generator(getattr(numpy.random, state["bit_generator"])(sequence))
    generator.bit_generator.state = state
    return generator


def _numpy_random_state_parts(value: Any) -> list[Any]:
    state = value.get_state(legacy=False)
    _check_bit_generator(state)
    return [state]


def _numpy_random_state(state: Any) -> Any:
    import numpy

    _check_bit_generator(state)
    generator = numpy.random.RandomState(getattr(numpy.random, state["bit_generator"])())
    generator.set_state(state)
    return generator


def _check_bit_generator(state: Any) -> None:
    """Raises ``ValueError`` unless NumPy can take the state: it does not check an index that is in it."""
    name = state["bit_generator"]
    if name not in _BIT_GENERATORS:
        raise ValueError(f"its bit generator is a {name!r}: save its state, x.bit_generator.state")
    path, most = _BIT_GENERATORS[name]
    found = functools.reduce(operator.getitem, path, state) if path else 0
    if not 0 <= _checked(found, int) <= most:
        raise ValueError(f"the index {'.'.join(path)} is {found}, expected at most {most}")


def refill_generator(live: Any, loaded: Any) -> bool:
    """Gives the random generator ``live`` the state of ``loaded``, since other objects may draw from it.

    Returns whether that was done: both must be generators of one kind, on one kind of device.
    """
    if type(live) is not type(loaded):
        return False
    if isinstance(live, torch.Generator) and live.device.type == loaded.device.type:
        live.set_state(loaded.get_state())
        return True
    if type(live) is random.Random:
        live.setstate(loaded.getstate())
        return True
    plain = plain_type_of(live)
    states: Sequence[Any] = [plain.parts(value)[0] for value in (live, loaded)] if plain in _NUMPY else ()
    if not states or states[0]["bit_generator"] != states[1]["bit_generator"]:
        return False
    if plain is _NUMPY[0]:
        live.bit_generator.state = states[1]
    else:
        live.set_state(states[1])
    return True


_NUMPY = (
    PlainType("numpy.Generator", _numpy_generator_parts, _numpy_generator),
    PlainType("numpy.RandomState", _numpy_random_state_parts, _numpy_random_state),
)
_BY_TYPE: Mapping[type, PlainType] = {
    datetime: PlainType("datetime", _time_parts, _time_of(datetime)),
    time: PlainType("time", _time_parts, _time_of(time)),
    date: PlainType("date", lambda x: [x.isoformat()], _text(date.fromisoformat)),
    timedelta: PlainType("timedelta", lambda x: [x.days, x.seconds, x.microseconds], _numbers(timedelta)),
    timezone: PlainType("timezone", lambda x: [_zone_parts(x)], _zone),
    **{
        kind: PlainType(kind.__name__, lambda x: [str(x)], _text(kind))
        for kind in (pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath, pathlib.PureWindowsPath)
    },
    deque: PlainType("deque", lambda x: [list(x), x.maxlen], _deque),
    defaultdict: PlainType("defaultdict", _defaultdict_parts, _defaultdict),
    range: PlainType("range", lambda x: [x.start, x.stop, x.step], _numbers(range)),
    slice: PlainType("slice", lambda x: [x.start, x.stop, x.step], slice),
    bytearray: PlainType("bytearray", lambda x: [bytes(x)], lambda data: bytearray(_checked(data, bytes))),
    Decimal: PlainType("Decimal", lambda x: [str(x)], _text(Decimal)),
    Fraction: PlainType("Fraction", lambda x: [x.numerator, x.denominator], _numbers(Fraction)),
    uuid.UUID: PlainType(
        "UUID",
        lambda x: [x.hex, x.is_safe.value],
        lambda text, safe: uuid.UUID(hex=_checked(text, str), is_safe=uuid.SafeUUID(safe)),
    ),
    random.Random: PlainType("Random", lambda x: list(x.getstate()), _random),
    torch.device: PlainType("device", lambda x: [str(x)], _text(torch.device)),
    torch.Generator: PlainType(
        "torch.Generator", lambda x: [x.device.type, bytes(x.get_state().tolist())], _torch_generator
    ),
}
BY_TAG: Mapping[str, PlainType] = {plain.tag: plain for plain in (*_BY_TYPE.values(), *_NUMPY)}
