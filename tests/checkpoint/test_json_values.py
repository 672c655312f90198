"""Encodes values as JSON and decodes them: values and types are kept, and no JSON runs code."""

import dataclasses
import enum
import json
import math
import pathlib
import random
import struct
import zoneinfo
from collections import Counter, OrderedDict, UserDict, defaultdict, deque, namedtuple
from datetime import datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.format.json_values import MAX_DEPTH, decode, encode
from dist_asgd.checkpoint.format.plain_types import refill_generator

TEXT = st.text(st.characters(exclude_categories=()))  # with surrogates
TAGS = st.sampled_from(["#tuple", "#dict", "#", "##", "#int", "#numpy", "#set"])
NUMPY = st.sampled_from(
    [
        numpy.float32(0.1),
        numpy.int64(-5),
        numpy.bool_(True),
        numpy.complex64(1j),
        *map(numpy.str_, ["", "\0", "å", "a\0", "\ud800"]),
        *map(numpy.bytes_, [b"", b"\0", b"a\0"]),
        numpy.float16(-0.0),
        numpy.timedelta64(3, "2147483647us"),
        numpy.datetime64("2020-01-01T00:00"),
        numpy.float64("nan"),
    ]
)
ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**400), 2**400),
    st.floats(),
    st.complex_numbers(),
    TEXT,
    TAGS,
    st.binary(),
    st.sampled_from([torch.float32, torch.float8_e4m3fn, torch.Size([]), torch.Size([2, 3]), math.inf, -0.0]),
    NUMPY,
)
ZONES = st.none() | st.timedeltas(timedelta(hours=-23), timedelta(hours=23)).map(timezone)
PLAIN = st.one_of(  # of the standard library, all hashable
    st.datetimes(timezones=ZONES),
    st.times(timezones=ZONES),
    st.dates(),
    st.timedeltas(),
    st.decimals(allow_nan=False),
    st.fractions(),
    st.uuids(),
    st.builds(range, st.integers(), st.integers(), st.integers(1, 2**70)),
    TEXT.map(pathlib.PurePosixPath),
    TEXT.map(pathlib.PureWindowsPath),
    st.sampled_from(
        [pathlib.Path("a", "..", "b"), torch.device("cuda:1"), timezone(timedelta(0), "Z"), Decimal("-NaN7")]
    ),
)
HASHABLE = st.recursive(
    ATOMS | PLAIN, lambda items: st.one_of(st.lists(items).map(tuple), st.frozensets(items)), max_leaves=4
)
VALUES = st.recursive(
    ATOMS | PLAIN,
    lambda items: st.one_of(
        st.lists(items),
        st.lists(items).map(tuple),
        st.sets(HASHABLE),
        st.dictionaries(TEXT | TAGS, items),
        st.dictionaries(HASHABLE, items),
        st.dictionaries(HASHABLE, items).map(OrderedDict),
        st.dictionaries(HASHABLE, st.integers()).map(Counter),
        st.builds(deque, st.lists(items), st.none() | st.integers(0, 9)),
        st.builds(defaultdict, st.sampled_from([None, list, int]), st.dictionaries(HASHABLE, items)),
        st.builds(slice, items, items, items),
        st.binary().map(bytearray),
    ),
    max_leaves=12,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | TAGS,
    lambda items: st.lists(items) | st.dictionaries(TAGS | st.sampled_from(["#float", "#Size", "#bytes"]), items),
)


def through_json(value: Any) -> Any:
    text = json.dumps(encode(value, "v"), allow_nan=False)
    return decode(json.loads(text), "v")


def form(value: Any) -> Any:
    """Returns a form that is equal for equal values of equal types only: NaNs by their bits, containers in order."""
    kind = type(value).__name__
    if isinstance(value, float) and type(value) is float:
        return kind, struct.pack(">d", value)
    if type(value) is complex:
        return kind, struct.pack(">dd", value.real, value.imag)
    if isinstance(value, numpy.generic | numpy.ndarray):
        return kind, value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, datetime | time):
        return kind, str(value), value.fold, form(value.tzinfo)
    if isinstance(value, timezone):
        return kind, repr(value), value.tzname(None)
    if isinstance(value, Decimal):
        return kind, str(value)
    if isinstance(value, deque):
        return kind, value.maxlen, [form(item) for item in value]
    if isinstance(value, slice):
        return kind, form(value.start), form(value.stop), form(value.step)
    if isinstance(value, defaultdict):
        return kind, value.default_factory, form(dict(value))
    if isinstance(value, dict):
        return kind, [(form(key), form(item)) for key, item in value.items()]
    if isinstance(value, set | frozenset):
        return kind, sorted(repr(form(item)) for item in value)
    if isinstance(value, list | tuple):
        return kind, [form(item) for item in value]
    return kind, value


@given(VALUES)
@settings(max_examples=150, deadline=None)
def test_every_value_comes_back(value: Any) -> None:
    assert form(through_json(value)) == form(value)


@pytest.mark.parametrize("dtype", ["bool", "int8", "<u4", ">f8", "complex64", "U5", "S3", "m8[ns]", "float16"])
def test_arrays_of_numpy_come_back(dtype: str) -> None:
    for shape in [(), (0,), (2, 3), (2, 0, 3)]:
        value = numpy.arange(math.prod(shape)).reshape(shape).astype(dtype)
        again = through_json(value)
        assert type(again) is numpy.ndarray and form(again) == form(value)
        assert again.flags.writeable
    assert through_json(numpy.str_("x" * 10_000)) == "x" * 10_000
    transposed = numpy.arange(6.0).reshape(2, 3).T
    assert numpy.array_equal(through_json(transposed), transposed)


def test_numpys_generators_come_back() -> None:
    state = numpy.random.RandomState(5).get_state()
    assert form(through_json(state)) == form(state)
    state = numpy.random.default_rng(5).bit_generator.state
    assert form(through_json(state)) == form(state)


def draws(generator: Any) -> list[Any]:
    """Returns numbers that the random generator gives next, each of another kind."""
    if isinstance(generator, torch.Generator):
        return [torch.rand(3, generator=generator).tolist(), torch.randn(20, generator=generator).tolist()]
    if isinstance(generator, random.Random):
        return [generator.random(), generator.gauss(0, 1), generator.randbytes(3)]
    return [generator.normal(size=3).tolist(), generator.bytes(3), generator.permutation(5).tolist()]


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.Generator().manual_seed(5),
        lambda: random.Random(5),
        lambda: numpy.random.RandomState(5),
        lambda: numpy.random.RandomState(numpy.random.SFC64(5)),
        *(
            lambda bits=bits: numpy.random.Generator(bits(numpy.random.SeedSequence([1, 2**70])))
            for bits in (numpy.random.PCG64, numpy.random.PCG64DXSM, numpy.random.MT19937, numpy.random.Philox)
        ),
    ],
)
def test_random_generators_go_on(make: Any) -> None:
    generator = make()
    draws(generator)
    again, other = through_json(generator), make()
    assert type(again) is type(generator) and refill_generator(other, again)
    expected = draws(generator)
    assert draws(again) == draws(other) == expected
    if isinstance(generator, numpy.random.Generator):
        assert draws(again.spawn(1)[0]) == draws(generator.spawn(1)[0])
    assert not refill_generator(random.Random() if isinstance(other, torch.Generator) else torch.Generator(), other)


@given(JSON)
@settings(max_examples=150, deadline=None)
def test_whatever_json_there_is_gives_a_value_or_one_error(encoded: Any) -> None:
    try:
        decode(encoded, "the key")
    except CheckpointError as error:
        assert "the key" in str(error)


@pytest.mark.parametrize(
    "encoded",
    [
        {"#tuple": 1},
        {"#tuple": [1], "more": 2},
        {"#dict": [[[], 1]]},
        {"#dict": [[1]]},
        {"#dict": [1]},
        {"#Counter": [[1, 2, 3]]},
        {"#set": [[1]]},
        {"#object": "os.system"},
        {"#float": "00"},
        {"#float": 1.0},
        {"#int": "ten"},
        {"#str": "zz"},
        {"#bytes": "*"},
        {"#bytes": None},
        {"#Size": ["2"]},
        {"#dtype": "load"},
        {"#dtype": ["float32"]},
        {"#numpy": ["|O", None, ""]},
        {"#numpy": ["<f4,<f4", [1], ""]},
        {"#numpy": ["<f4", [2], "AAAA"]},
        {"#numpy": ["<f4", [-1], "AAAAAA=="]},
        {"#numpy": ["<f4", None, ""]},
        {"#numpy": ["<f16", None, "AAAAAAAAAAAAAAAAAAAAAA=="]},
        {"#numpy": ["<U1", None, ""]},
        {"#numpy": ["<U1", None, "////fw=="]},
        {"#numpy": ["<U9999", [2**60], ""]},
        {"#numpy": 5},
        {"#datetime": ["2020-01-01", 0, [0, 10**9, 0, None]]},
        {"#datetime": ["today", 0, None]},
        {"#PurePosixPath": [5]},
        {"#bytearray": [10**15]},
        {"#deque": [[1], "x"]},
        {"#defaultdict": ["eval", {}]},
        {"#Decimal": ["x"]},
        {"#Fraction": [1, 0]},
        {"#range": [0, 1, 0]},
        {"#UUID": ["zz", 0]},
        {"#device": ["nowhere"]},
        {"#Random": [3, [1], None]},
        {"#torch.Generator": ["cpu", {"#bytes": "AAAA"}]},
        {"#torch.Generator": ["nowhere", {"#bytes": "AAAA"}]},
        {"#numpy.Generator": [{"bit_generator": "system"}, None]},
        {"#numpy.Generator": [{"bit_generator": "PCG64"}, {"entropy": 1, "pool_size": 10**15}]},
        {"#numpy.RandomState": [{"bit_generator": "MT19937", "pos": 0, "state": {"key": [], "pos": 10**6}}]},
        {"#numpy.RandomState": []},
        {"#": 5},
    ],
    ids=str,
)
def test_damaged_values_are_refused(encoded: Any) -> None:
    with pytest.raises(CheckpointError, match=r"the value state\.x is damaged"):
        decode(encoded, "state.x")


def test_too_many_lists_are_refused() -> None:
    encoded: Any = []
    for _ in range(1000):
        encoded = [encoded]
    with pytest.raises(CheckpointError, match="damaged"):
        decode(encoded, "v")
    deep: Any = 0
    for _ in range(MAX_DEPTH - 1):
        deep = {(1,): deep}
    assert through_json(deep) == deep
    with pytest.raises(TypeError, match="contains itself"):
        encode([[deep]], "v")
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(TypeError, match="contains itself"):
        encode(circle, "v")


Pair = namedtuple("Pair", "a b")


class Text(str):
    __slots__ = ()


class Number(enum.IntEnum):
    ONE = 1


@dataclasses.dataclass
class Record:
    x: int = 0


class Float(numpy.float64):
    __slots__ = ()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": [0, object()]}, ["data['a'][1]", "builtins.object", "state_dict()"]),
        (Pair(1, 2), ["test_json_values.Pair", "save x._asdict()"]),
        (Text("x"), ["test_json_values.Text", "save str(x)"]),
        ((torch.zeros(2),), ["data[0]", "a tensor in a tuple"]),
        ({1: lambda: 0}, ["data[1]", "function"]),
        (numpy.array([object()]), ["numpy.ndarray"]),
        ([Number.ONE], ["data[0]", "test_json_values.Number", "save x.value"]),
        ({"a": {Number.ONE: 1}}, ["a key of data['a']", "save x.value"]),
        (Record(), ["test_json_values.Record", "save dataclasses.asdict(x)"]),
        (UserDict(a=1), ["collections.UserDict", "save dict(x)"]),
        ({"a": defaultdict(lambda: 0)}, ["data['a']", "collections.defaultdict", "save dict(x)"]),
        (deque([torch.zeros(1)]), ["data[0]", "save list(x)"]),
        (datetime.now(zoneinfo.ZoneInfo("UTC")), ["datetime.datetime", "ZoneInfo", "astimezone"]),
        (numpy.zeros(2, [("a", "i4")]), ["numpy.ndarray"]),
        (numpy.longdouble(1), ["numpy.longdouble"]),  # whose bytes other machines take for other numbers
        (Float(1), ["test_json_values.Float"]),
        (numpy.void(b"a"), ["numpy.void"]),
    ],
    ids=lambda value: None if isinstance(value, list) and value and isinstance(value[0], str) else type(value).__name__,
)
def test_what_cannot_be_saved_is_named(value: Any, words: list[str]) -> None:
    with pytest.raises(TypeError) as error:
        encode(value, "data")
    assert all(word in str(error.value) for word in words), error.value
