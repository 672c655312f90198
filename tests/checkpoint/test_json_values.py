"""Encodes values as JSON and decodes them: values and types are kept, and no JSON runs code."""

import json
import math
import struct
from collections import Counter, OrderedDict, namedtuple
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.format.json_values import MAX_DEPTH, decode, encode

TEXT = st.text(st.characters(exclude_categories=()))  # with surrogates
TAGS = st.sampled_from(["#tuple", "#dict", "#", "##", "#int", "#numpy", "#set"])
NUMPY = st.sampled_from(
    [
        numpy.float32(0.1),
        numpy.int64(-5),
        numpy.bool_(True),
        numpy.complex64(1j),
        numpy.str_("å"),
        numpy.bytes_(b"a"),
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
HASHABLE = st.recursive(ATOMS, lambda items: st.one_of(st.lists(items).map(tuple), st.frozensets(items)), max_leaves=4)
VALUES = st.recursive(
    ATOMS,
    lambda items: st.one_of(
        st.lists(items),
        st.lists(items).map(tuple),
        st.sets(HASHABLE),
        st.dictionaries(TEXT | TAGS, items),
        st.dictionaries(HASHABLE, items),
        st.dictionaries(HASHABLE, items).map(OrderedDict),
        st.dictionaries(HASHABLE, st.integers()).map(Counter),
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
    transposed = numpy.arange(6.0).reshape(2, 3).T
    assert numpy.array_equal(through_json(transposed), transposed)


def test_numpys_generators_come_back() -> None:
    state = numpy.random.RandomState(5).get_state()
    assert form(through_json(state)) == form(state)
    state = numpy.random.default_rng(5).bit_generator.state
    assert form(through_json(state)) == form(state)


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
        {"#numpy": ["<U9999", [2**60], ""]},
        {"#numpy": 5},
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


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": [0, object()]}, ["data['a'][1]", "builtins.object", "state_dict()"]),
        (Pair(1, 2), ["test_json_values.Pair"]),
        (Text("x"), ["test_json_values.Text"]),
        ((torch.zeros(2),), ["data[0]", "a tensor in a tuple"]),
        ({1: lambda: 0}, ["data[1]", "function"]),
        (numpy.array([object()]), ["numpy.ndarray"]),
        (torch.device("cpu"), ["torch.device"]),
    ],
    ids=[
        "object",
        "named tuple",
        "string of another type",
        "tensor in a tuple",
        "function",
        "objects in an array",
        "device",
    ],
)
def test_what_cannot_be_saved_is_named(value: Any, words: list[str]) -> None:
    with pytest.raises(TypeError) as error:
        encode(value, "data")
    assert all(word in str(error.value) for word in words), error.value
