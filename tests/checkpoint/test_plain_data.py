"""Plain data of a state becomes what the checkpoint has; objects get what was saved, whatever its shape."""

import collections
import copy
import json
import logging
import random
import types

import numpy
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from dist_asgd import load, save
from dist_asgd.checkpoint import CheckpointError
from dist_asgd.checkpoint.format.entries import SavedTensor
from dist_asgd.checkpoint.format.json_values import Values, decode
from dist_asgd.checkpoint.state.contents import contents_of, destination_of
from tests.support.ranks import message_of, run_alone, run_ranks


def loaded(folder, saved, live, **options):
    """Saves one state, loads it into another, and returns that."""
    save(folder, saved)
    load(folder, live, **options)
    return live


@pytest.mark.parametrize("before", [[], None, 0, {}, {"a": 1}, [{"a": 7}] * 3, torch.Size([1])], ids=repr)
def test_whatever_was_there_is_replaced(tmp_path, before):
    batches = [{"a": 1, "t": torch.ones(2)}, {"a": 2, "b": [2, {"c": (3,)}]}]
    live = {"x": before, "d": {"x": copy.deepcopy(before), "y": before}}
    found = loaded(tmp_path, {"x": batches, "d": {"x": batches, "y": 5}}, live)
    for data in (found["x"], found["d"]["x"]):
        assert data[0].pop("t").tolist() == [1, 1] and data == [{"a": 1}, batches[1]]
    assert found["d"]["y"] == 5


def test_dicts_are_compared_by_name(tmp_path):
    """What only the checkpoint has is added; what only the live dict has is missing, or stays in a lenient load."""
    table, steps = torch.zeros(2), [1, 2, 3]
    live = {"data": {"epoch": 0, "table": table, "steps": steps, "inner": {"old": 1}}}
    inner = live["data"]["inner"]
    saved = {
        "data": {
            "epoch": 4,
            "table": torch.ones(2),
            "steps": [9],
            "inner": {"old": 2, "new": None},
            "more": {"n": 1},
        }
    }
    loaded(tmp_path, saved, live)
    assert table.tolist() == [1, 1] and live["data"]["table"] is table and live["data"]["steps"] is steps == [9]
    assert inner is live["data"]["inner"] and inner == {"old": 2, "new": None}
    assert live["data"]["epoch"] == 4 and live["data"]["more"] == {"n": 1}
    live["data"] |= {"added": 1, "tensor": torch.zeros(3)}
    inner["later"] = 5
    with pytest.raises(CheckpointError) as error:
        load(tmp_path, live)
    assert str(error.value).splitlines()[1:] == [
        "missing from the checkpoint (3):",
        "  data.added: expected a value like the int there",
        "  data.inner.later: expected a value like the int there",
        "  data.tensor: expected float32 [3]",
    ]
    live["data"]["epoch"] = 0
    load(tmp_path, live, strict=False)
    assert live["data"]["epoch"] == 4 and live["data"]["added"] == 1 and inner == {"old": 2, "new": None, "later": 5}


def test_what_stays_an_error(tmp_path):
    model = nn.Linear(2, 2)
    save(tmp_path, {"nets": {"a": model, "b": nn.Linear(1, 1)}, "t": {"x": 1}, "v": torch.zeros(2), "n": 3})
    live = {"nets": {"a": model}, "t": torch.zeros(1), "v": {"w": torch.zeros(2)}, "n": torch.zeros(1), "new": None}
    with pytest.raises(CheckpointError) as error:
        load(tmp_path, live)
    assert str(error.value).splitlines()[1:] == [
        "missing from the checkpoint (2):",
        "  new: expected a value like the NoneType there",
        "  v.w: expected float32 [2]",
        "unexpected in the checkpoint (2):",
        "  nets.b.bias: float32 [1], nothing here takes it",
        "  nets.b.weight: float32 [1, 1], nothing here takes it",
        "of another dtype or kind (2):",
        "  n: found the value 3, expected float32 [1]",
        "  t: found a dict or a list, expected a tensor",
    ]
    with pytest.raises(TypeError, match="nets is in a mappingproxy, which cannot be changed"):
        load(tmp_path, types.MappingProxyType({"nets": 5}))


def test_containers_with_tensors_keep_their_types_and_order(tmp_path):
    state = {
        "ordered": collections.OrderedDict(b=torch.ones(1), a=2),
        "default": collections.defaultdict(list, {3: torch.ones(1), True: "x"}),
        "numbers": {7: torch.ones(1), "x": {2.5: torch.zeros(1)}},
    }
    found = {}
    loaded(tmp_path / "c", state, found)
    assert {name: type(value) for name, value in found.items()} == {name: type(value) for name, value in state.items()}
    assert list(found["ordered"]) == ["b", "a"] and found["default"].default_factory is list
    assert [(key, type(key)) for key in found["default"]] == [(3, int), (True, bool)]
    assert list(found["numbers"]["x"]) == [2.5]
    dcp_to_torch_save(tmp_path / "c", tmp_path / "plain.pt")  # sees the tensors, under strings
    plain = torch.load(tmp_path / "plain.pt")
    assert plain["ordered"]["b"].tolist() == plain["numbers"]["7"].tolist() == [1]
    stock = {"ordered": collections.OrderedDict(b=torch.zeros(1))}
    dcp.load(stock, checkpoint_id=tmp_path / "c", no_dist=True)
    assert stock["ordered"]["b"].tolist() == [1]


LEAVES = st.one_of(
    st.sampled_from([None, True, 1, 1.0, "", (1, [2]), {1, 2}, collections.deque([1], 3), torch.float32, b"x", [], {}]),
    st.integers(0, 9).map(lambda number: torch.tensor([number])),
)
KEYS = st.sampled_from([0, 1.5, True, "a", "b.c", "#x", (1, "y"), None, ""])
NESTED = st.recursive(
    LEAVES,
    lambda items: st.one_of(
        st.lists(items, max_size=3),
        st.dictionaries(st.sampled_from(["a", "b", "b.c"]), items, max_size=3),
        st.dictionaries(KEYS, items, max_size=3),
        st.dictionaries(KEYS, items, max_size=3).map(collections.OrderedDict),
        st.dictionaries(KEYS, items, max_size=3).map(lambda found: collections.defaultdict(list, found)),
    ),
    max_leaves=9,
)


def form(value, kinds=True):
    """A form that is equal for equal values of equal types; of dicts and lists in order, but for plain dicts.

    Without ``kinds`` all dicts are alike.
    """
    kind = type(value).__name__
    if isinstance(value, torch.Tensor):
        return kind, value.tolist()
    if isinstance(value, dict):
        items = [(form(key), form(item, kinds)) for key, item in value.items()]
        return (kind, items) if kinds and type(value) is not dict else ("dict", sorted(items, key=repr))
    if isinstance(value, (list, tuple, collections.deque)):
        return kind, [form(item, kinds) for item in value]
    return kind, repr(value)


@given(NESTED, st.one_of(st.just({}), NESTED))
@settings(max_examples=100, deadline=None)
def test_nested_state_comes_back_as_it_was(value, before):
    """Into an empty dict, and into other plain data, whose dicts stay what they are."""
    try:
        contents = contents_of({"x": value})
    except ValueError as error:
        assert "two entries have the key" in str(error)
        return
    entries = {key: SavedTensor(entry.shape, entry.dtype) for key, entry in contents.tensors.items()}
    values = Values(json.loads(json.dumps(contents.values, allow_nan=False)), decode)
    for there in ({}, before):
        live = {"x": copy.deepcopy(there)}
        plan = destination_of(live, entries, values, contents.paths)
        if plan.problems:
            assert form(there) != form({})
            continue
        for key, filled in plan.tensors.items():
            for entry in filled:
                entry.blocks[0].data.copy_(contents.tensors[key].blocks[0].data)
        plan.finish()
        assert form(live["x"], there is not before) == form(value, there is not before)


class Record(dict):
    """A dict of a type of its own."""


def refused(rank, folder):
    pair = collections.namedtuple("pair", "a b")
    way_out = {
        "record": (Record(a=1), "save dict(x)"),
        "objects": (Record(a=nn.Linear(1, 1)), "save dict(x)"),
        "proxy": (types.MappingProxyType({"a": torch.ones(1)}), "save dict(x)"),
        "pair": (pair(1, 2), "save x._asdict()"),
        "made": (collections.defaultdict(lambda: 0, a=torch.ones(1)), "save dict(x)"),
        "queue": ([collections.deque([torch.ones(1)])], "save list(x)"),
    }
    for name, (value, text) in way_out.items():
        state = {"d": {name: value if rank else 0}}
        message = message_of(lambda state=state: save(folder, state), TypeError)
        assert f"d.{name}" in message and text in message, message
    assert not folder.exists() or not list(folder.iterdir())


def test_what_would_change_its_type_is_refused_on_every_rank(tmp_path):
    run_ranks(2, refused, tmp_path / "c")


def test_random_generators_of_the_state_go_on(tmp_path):
    def make():
        return {
            "torch": torch.Generator().manual_seed(1),
            "python": random.Random(1),
            "numpy": [numpy.random.default_rng(1), (numpy.random.RandomState(1),)],
        }

    def draw(state):
        first, (second,) = state["numpy"]
        return torch.rand(2, generator=state["torch"]).tolist(), state["python"].random(), first.random(), second.rand()

    state, live = make(), make()
    draw(state)
    held = dict(live)
    loaded(tmp_path, state, live)
    assert live == held  # generators are equal to nothing but themselves
    assert draw(live) == draw(state)


def test_an_object_that_is_there_twice_is_refilled_once(tmp_path):
    one, other = [1, {"a": 2}], {"n": 1}
    same, live = [], {}
    state = {"a": same, "b": same, "c": live, "d": live}
    loaded(tmp_path, {"a": one, "b": one, "c": other, "d": {"n": 2}}, state)
    assert state["a"] is state["b"] is same and same == one
    assert state["c"] is live and (live, state["d"]) == ({"n": 1}, {"n": 2})


class History(nn.Module):
    """A module whose extra state is a tensor that grows."""

    def __init__(self, length):
        super().__init__()
        self.losses = torch.zeros(length)

    def get_extra_state(self):
        return self.losses

    def set_extra_state(self, state):
        self.losses = state


class Meter:
    """An object with a state whose tensors change their shape and dtype."""

    def __init__(self, values):
        self.values = values

    def state_dict(self):
        return {"values": self.values}

    def load_state_dict(self, state):
        self.values = state["values"]


def test_tensors_that_objects_take_may_have_any_shape(tmp_path):
    module = nn.Sequential(History(5), nn.Linear(1, 1))
    module[0].losses += 1
    live = {"m": nn.Sequential(History(2), nn.Linear(1, 1)), "meter": Meter(torch.zeros(3))}
    loaded(tmp_path, {"m": module, "meter": Meter(torch.ones(2, 2, dtype=torch.int64))}, live)
    assert live["m"][0].losses.tolist() == [1] * 5
    assert live["meter"].values.dtype == torch.int64 and live["meter"].values.shape == (2, 2)


def test_a_lenient_load_skips_other_shapes_and_lists_them(tmp_path):
    run_alone(lenient, tmp_path)


def lenient(folder):
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("dist_asgd").addHandler(handler)

    def build(size):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, size))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        return {"optimizer": optimizer, "model": model, "d": {"t": torch.ones(size), "n": size}}

    def step(state):
        state["model"](torch.ones(1, 3)).sum().backward()
        state["optimizer"].step()

    state, live = build(4), build(2)
    step(state)
    head = live["model"][1].weight.clone()
    save(folder, state)
    with pytest.raises(CheckpointError, match=r"of another shape \(5\)"):
        load(folder, live)
    load(folder, live, strict=False)
    assert torch.equal(live["model"][0].weight, state["model"][0].weight) and torch.equal(live["model"][1].weight, head)
    assert live["d"]["t"].tolist() == [1, 1] and live["d"]["n"] == 4
    assert len(live["optimizer"].state) == 2  # the other parameters begin anew
    assert (
        len(lines) == 1
        and "not loaded, of another shape (5):\n  d.t: found float32 [4], expected float32 [2]" in lines[0]
    )
    assert "optimizer.state.1.weight: its parameter was [4, 3], and is [2, 3] now" in lines[0]
    step(live)
