"""Stock DCP checkpoints are read back equal; what is in them is neither run nor believed."""

import collections
import contextlib
import copyreg
import io
import math
import os
import pickle
import pickletools
import random
import struct
import sys
import tracemalloc
import zipfile
from pathlib import PosixPath

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as OldTensorProperties
from torch.distributed.checkpoint.metadata import StorageMeta, TensorStorageMetadata
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dist_asgd.boxes import Box
from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.format.dcp_metadata import StoredChunk, StoredObject, stock_metadata
from dist_asgd.checkpoint.format.entries import SavedTensor
from dist_asgd.checkpoint.stock.items import item_object, item_tensor
from dist_asgd.checkpoint.stock.metadata import read_stock_metadata
from dist_asgd.checkpoint.stock.pickle_reader import Call as PickledCall
from dist_asgd.checkpoint.stock.pickle_reader import Global, read_pickle
from tests.support.items import DTYPES, SHAPES, item, raw_bytes, sample
from tests.support.ranks import run_alone, run_ranks
from tests.support.stock_checkpoints import METADATA, ONE, Call, FsspecWriter, harmful, saved, text, with_description


def read_checkpoint(folder):
    """Every key of a stock checkpoint with its whole tensor or its value, by the code under test."""
    found = read_stock_metadata((folder / ".metadata").read_bytes())

    def stored(place):
        return (folder / place.path).read_bytes()[place.offset : place.offset + place.length]

    state = {key: item_object(stored(place)) for key, place in found.objects.items()}
    for key, tensor in found.tensors.items():
        state[key] = torch.zeros(tensor.saved.shape, dtype=tensor.saved.dtype)
        for chunk in tensor.chunks:
            where = tuple(slice(o, o + s) for o, s in zip(chunk.box.offsets, chunk.box.sizes, strict=True))
            state[key][where] = item_tensor(stored(chunk), tensor.saved.dtype, chunk.box.sizes)
    return state


# --- checkpoints that torch wrote ---


@pytest.mark.parametrize("remote", [False, True], ids=["FileSystemWriter", "FsspecWriter"])
def test_what_two_ranks_saved_is_read_back(tmp_path, remote):
    expected = run_ranks(2, save_fsdp2, tmp_path, remote)[0]
    found = read_checkpoint(tmp_path)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert raw_bytes(found[key]) == raw_bytes(value), key
        else:
            assert found[key] == value, key


def save_fsdp2(rank, folder, remote):
    """Saves as launch/checkpoints.py does, with two threads; returns the whole state by key."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 1, dtype=torch.bfloat16))
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (2,)))
    state = {
        "model": model.state_dict(),  # the last layer's rows are all on rank 0
        "plain": {
            "permuted": torch.randn(2, 3, 4).mT,
            "0-d": torch.tensor(7),
            "empty": torch.zeros(0, 2),
        },
        "list": [torch.arange(10)[3:6], 5, "text", None],
    }
    if remote:
        writer = FsspecWriter(f"file://{folder}", thread_count=2, sync_files=False)
    else:
        writer = dcp.FileSystemWriter(folder, thread_count=2)
    dcp.save(state, storage_writer=writer)
    assert_ours_is_theirs(folder)
    whole = {f"model.{k}": v.full_tensor() if isinstance(v, DTensor) else v for k, v in state["model"].items()}
    whole |= {f"plain.{k}": v for k, v in state["plain"].items()}
    return whole | {f"list.{n}": v for n, v in enumerate(state["list"])}


def assert_ours_is_theirs(folder):
    """Our metadata of what was found in stock metadata is the same but for who saved it, and empty chunks."""
    data = (folder / ".metadata").read_bytes()
    theirs, found = pickle.loads(data), read_stock_metadata(data)
    tensors = {key: (t.saved.dtype, t.saved.shape, t.chunks) for key, t in found.tensors.items()}
    ours = pickle.loads(stock_metadata(tensors, found.objects, theirs.planner_data))
    for entry in theirs.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            entry.chunks = [chunk for chunk in entry.chunks if chunk.sizes.numel()]
            if hasattr(entry.properties, "strides"):  # since torch 2.15, which does not read them
                entry.properties.strides = None
    places = {index: (info, index.index) for index, info in theirs.storage_data.items() if index in ours.storage_data}
    assert {index: (info, index.index) for index, info in ours.storage_data.items()} == places
    ours.storage_data, ours.storage_meta = theirs.storage_data, theirs.storage_meta
    assert ours == theirs


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read(dtype):
    for shape in SHAPES:
        tensor = sample(dtype, shape)
        for data in (saved(tensor), item(tensor)):
            found = item_tensor(data, dtype, shape)
            assert found.dtype == dtype and found.shape == tensor.shape and raw_bytes(found) == raw_bytes(tensor)


def test_strides_are_kept():
    tensor = torch.arange(60.0).reshape(3, 4, 5).permute(2, 0, 1)[1:, ::2]
    found = item_tensor(saved(tensor), tensor.dtype, tensor.shape)
    assert torch.equal(found, tensor) and found.stride() == tensor.stride()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_metadata_of_other_releases(protocol):
    metadata = pickle.loads(stock_metadata(ONE, {"b": StoredObject("dir/y", 1, 2)}, {}))
    expected = read_stock_metadata(pickle.dumps(metadata, protocol))
    assert expected.tensors["a"].saved == SavedTensor((4, 6), torch.float32)
    assert expected.objects == {"b": StoredObject("dir/y", 1, 2)}

    metadata.storage_meta = StorageMeta(PosixPath("/some/where"), "1")
    metadata.planner_data = collections.OrderedDict(a=("a",), b=("b", 0))
    assert read_stock_metadata(pickle.dumps(metadata, protocol)) == expected

    del metadata.version, metadata.storage_meta  # before 2.4
    metadata.state_dict_metadata["a"].properties = OldTensorProperties(dtype=torch.float32)
    assert read_stock_metadata(pickle.dumps(metadata, protocol)) == expected


# --- damage ---


def flips(data, thoroughly=()):
    """(position, data with one bit flipped there): every bit in the range `thoroughly`, else one of each byte."""
    for at in range(len(data)):
        for bit in range(8) if at in thoroughly else [at * 5 % 8]:
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            yield at, bytes(damaged)


@pytest.mark.parametrize("make", [saved, item])
def test_no_flipped_bit_of_an_item_changes_the_tensor(make):
    tensor = sample(torch.float32, (2, 3))
    data = make(tensor)
    payload = range(data.index(raw_bytes(tensor)), data.index(raw_bytes(tensor)) + 24)
    for at, damaged in flips(data, payload):
        try:
            found = item_tensor(damaged, torch.float32, (2, 3))
        except CheckpointError:
            continue
        assert at not in payload and raw_bytes(found) == raw_bytes(tensor) and found.stride() == tensor.stride(), at


def test_a_cut_item_is_refused():
    data = item(sample(torch.float32, (2, 3)))
    for length in range(len(data)):
        with pytest.raises(CheckpointError):
            item_tensor(data[:length], torch.float32, (2, 3))


def test_no_flipped_bit_of_a_value_changes_it():
    data = saved({"lr": 0.1, "names": ["a", "b"]})
    for _, damaged in flips(data):
        with contextlib.suppress(CheckpointError):
            assert item_object(damaged) == {"lr": 0.1, "names": ["a", "b"]}


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(METADATA) - 1), st.binary(max_size=4), st.integers(0, 4)), max_size=4))
def test_damaged_metadata_is_refused_or_valid(changes):
    data = bytearray(METADATA)
    for at, new, removed in changes:
        data[at : at + removed] = new
    for trust in (False, True):
        with contextlib.suppress(CheckpointError):
            check_valid(read_stock_metadata(bytes(data), trust))


def test_metadata_with_a_flipped_bit_is_refused_or_valid():
    accepted = []
    for _, damaged in flips(METADATA):
        with contextlib.suppress(CheckpointError):
            accepted.append(read_stock_metadata(damaged))
    assert accepted, "a bit of a name or of an offset may be another one"
    for found in accepted:
        check_valid(found)


def check_valid(found):
    """Asserts that chunks cover each element once, lie inside the checkpoint, and have the bytes of their elements."""
    assert found.paths.keys() == found.tensors.keys() | found.objects.keys()
    places = [*found.objects.values(), *(chunk for tensor in found.tensors.values() for chunk in tensor.chunks)]
    for place in places:
        assert place.offset >= 0 and place.length >= 0 and not {"", ".", ".."} & set(place.path.split("/"))
    for tensor in found.tensors.values():
        shape, dtype = tensor.saved.shape, tensor.saved.dtype
        assert sum(chunk.box.numel for chunk in tensor.chunks) == math.prod(shape)
        assert all(chunk.box.numel * dtype.itemsize <= chunk.length for chunk in tensor.chunks)
        counts = torch.zeros(shape, dtype=torch.int32)  # as few elements as the lengths in METADATA have bytes
        for chunk in tensor.chunks:
            counts[tuple(slice(o, o + s) for o, s in zip(chunk.box.offsets, chunk.box.sizes, strict=True))] += 1
        assert counts.eq(1).all()


# --- contradictions ---


def metadata_of(shape, found, length=10_000):
    chunks = [StoredChunk(box, "x", 0, length) for box in found]
    return stock_metadata({"w": (torch.float32, shape, chunks)}, {}, {})


boxes_of_a_cube = st.builds(
    lambda low, high: Box(low, tuple(max(h - o, 0) for o, h in zip(low, high, strict=True))),
    st.tuples(*[st.integers(0, 2)] * 3),
    st.tuples(*[st.integers(0, 3)] * 3),
)


@st.composite
def cubes(draw):
    """A 3 x 2 x 3 tensor cut in boxes at random; then maybe one more box, one less, or another."""
    whole = [Box((0, 0, 0), (3, 2, 3))]
    for _ in range(draw(st.integers(0, 6))):
        box = whole.pop(draw(st.integers(0, len(whole) - 1)))
        dim = draw(st.integers(0, 2))
        cut = draw(st.integers(0, box.sizes[dim]))
        for offset, size in ((0, cut), (cut, box.sizes[dim] - cut)):
            offsets, sizes = list(box.offsets), list(box.sizes)
            offsets[dim], sizes[dim] = offsets[dim] + offset, size
            whole.append(Box(tuple(offsets), tuple(sizes)))
    if draw(st.booleans()):
        whole.append(draw(boxes_of_a_cube))
    if draw(st.booleans()):
        whole.pop(draw(st.integers(0, len(whole) - 1)))
    return whole


@settings(max_examples=200, deadline=None)
@given(cubes())
def test_exactly_the_boxes_that_cover_every_element_once_are_accepted(found):
    counts = torch.zeros(5, 5, 5, dtype=torch.int64)
    for box in found:
        counts[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))] += 1
    good = bool((counts[:3, :2, :3] == 1).all()) and int(counts.sum()) == 18
    try:
        read_stock_metadata(metadata_of((3, 2, 3), found))
    except CheckpointError:
        assert not good
    else:
        assert good


def edited(change):
    metadata = pickle.loads(METADATA)
    entry = metadata.state_dict_metadata["a"]
    index, info = next((index, info) for index, info in metadata.storage_data.items() if index.fqn == "a")
    change(metadata, entry, index, info)
    return pickle.dumps(metadata)


CONTRADICTIONS = {
    "too short": (lambda m, e, i, s: setattr(s, "length", 95), "cannot be stored in 95 bytes"),
    "negative offset": (lambda m, e, i, s: setattr(s, "offset", -1), "expected a number of 0 or more"),
    "huge length": (lambda m, e, i, s: setattr(s, "length", 2**63), "expected a number of 0 or more"),
    "no number": (lambda m, e, i, s: setattr(s, "length", True), "expected a number of 0 or more"),
    "compressed": (lambda m, e, i, s: setattr(s, "transform_descriptors", ["zstd"]), "compressed"),
    "no place": (lambda m, e, i, s: m.storage_data.pop(i), "does not say where"),
    "no properties": (lambda m, e, i, s: setattr(e, "properties", None), "expected TensorProperties"),
    "sparse": (lambda m, e, i, s: setattr(e.properties, "layout", torch.sparse_coo), "torch.strided"),
    "other dimensions": (lambda m, e, i, s: setattr(e, "size", torch.Size((4,))), "1 dimensions"),
    "too many dimensions": (lambda m, e, i, s: setattr(e, "size", (1,) * 65), "at most 64"),
    "outside": (lambda m, e, i, s: setattr(e, "size", torch.Size((4, 5))), "not inside"),
    "gap": (lambda m, e, i, s: setattr(e, "size", torch.Size((4, 7))), "gap at"),
    "no chunks": (lambda m, e, i, s: e.chunks.clear(), "gap at"),
    "not a tensor": (lambda m, e, i, s: m.state_dict_metadata.update(a=StorageMeta()), "TensorStorageMetadata"),
    "no state dict": (lambda m, e, i, s: setattr(m, "state_dict_metadata", []), "expected a dict"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_refused(name):
    change, message = CONTRADICTIONS[name]
    read_stock_metadata(edited(lambda *parts: None))
    with pytest.raises(CheckpointError, match=message):
        read_stock_metadata(edited(change))


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "../x", "a/../../x", "a//b", ".", "a\\b", "a\0b", "s3://b/x", "a/"]
)
def test_files_outside_of_the_checkpoint_are_refused(path):
    with pytest.raises(CheckpointError, match="inside of the checkpoint's directory"):
        read_stock_metadata(stock_metadata({}, {"v": StoredObject(path, 0, 1)}, {}))


def test_an_item_is_what_the_metadata_says():
    data = item(torch.zeros(4, 6))
    for dtype, shape in ((torch.int32, (4, 6)), (torch.float32, (6, 4)), (torch.float32, (2**40, 2**20))):
        with pytest.raises(CheckpointError, match="the metadata says"):
            item_tensor(data, dtype, shape)
    for value in (torch.zeros(3).to_sparse(), torch.zeros(3, dtype=torch.complex64).conj(), [torch.zeros(4, 6)]):
        with pytest.raises(CheckpointError):
            item_tensor(saved(value), torch.float32, (4, 6))


# --- harm ---


@pytest.fixture
def extension():
    copyreg.add_extension("os", "system", 0xF0)
    yield
    copyreg.remove_extension("os", "system", 0xF0)


def test_nothing_is_run(tmp_path, extension):
    canary = tmp_path / "canary"
    for name, data in harmful(canary):
        with contextlib.suppress(Exception):
            pickle.loads(data)
        assert canary.exists(), f"{name}: pickle itself does not run it, so it tests nothing"
        canary.unlink()
        with pytest.raises(CheckpointError):
            read_stock_metadata(data)
        with contextlib.suppress(CheckpointError):
            read_stock_metadata(data, trust=True)
        for read in (lambda data: item_tensor(data, torch.float32, ()), item_object):
            with pytest.raises(CheckpointError):
                read(with_description(data))
        assert not canary.exists(), name


def test_trust_skips_what_it_does_not_know_and_runs_a_value(tmp_path):
    canary = tmp_path / "canary"
    metadata = pickle.loads(METADATA)
    metadata.planner_data = Call(os.system, f"touch {canary}")
    with pytest.raises(CheckpointError, match=r"posix\.system.*trust=True"):
        read_stock_metadata(pickle.dumps(metadata))
    assert read_stock_metadata(pickle.dumps(metadata), trust=True) == read_stock_metadata(METADATA)
    assert not canary.exists()
    value = saved(collections.deque([1, 2]))
    with pytest.raises(CheckpointError, match="trust=True"):
        item_object(value)
    assert item_object(value, trust=True) == collections.deque([1, 2])


DAMAGED = {
    "empty": b"",
    "cut off": b"\x80\x02N",
    "memo": b"\x80\x02r\xff\xff\xff\xff.",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "text": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b".",
    "underflow": b"\x80\x02N\x86.",
    "unmarked": b"\x80\x02t.",
    "unknown memo": b"\x80\x02h\x07.",
    "odd items": b"\x80\x02}(Nu.",
    "append to a global": b"\x80\x02ctorch\nSize\nNa.",
    "build on a global": b"\x80\x02ctorch\nSize\n}b.",
    "call of a value": b"\x80\x02N)R.",
    "persistent id": b"\x80\x02NQ.",
    "no UTF-8": b"\x80\x02X\x03\x00\x00\x00\xff\xfe\xfd.",
    "protocol": b"\x80\x06N.",
    "cut off text": b"\x80\x02X\x09\x00\x00\x00abc",
    "cut off global": b"\x80\x02ctorch\nSize\n",
    "mark in a mark": b"\x80\x02((.",
    "items of a list": b"\x80\x02]K\x00Ns.",
    "append to a dict": b"\x80\x02}Na.",
    "state of a dict": b"\x80\x02}}b.",
    "second state": b"\x80\x02ctorch\nSize\n)R}b}b.",
    "call with a list": b"\x80\x02ctorch\nSize\n]R.",
    "call of a call": b"\x80\x02ctorch\nSize\n)R)R.",
    "object of a call": b"\x80\x02ctorch\nSize\n)R)\x81.",
    "global of numbers": b"\x80\x04K\x01K\x02\x93.",
    "deep key": b"\x80\x02})" + b"\x85" * 10**6 + b"Ns.",  # hashing it would overflow the stack
}
LARGE = {
    "memo": b"\x80\x02Nr\xff\xff\xff\xff.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
    "long text": b"\x80\x04]" + b"\x8c\x01a\x94a" * 1000 + b".",
    "lists": b"\x80\x02(" + b"]" * 10_000 + b"t.",
    "marks": b"\x80\x02(" + b"(" * 10_000 + b"t" * 10_000 + b"t.",
    "one tuple for many calls": b"\x80\x02ctorch\nSize\nq\x00("
    + b"N" * 10_000
    + b"tq\x01("
    + b"h\x00h\x01R" * 2000
    + b"t.",
    "one tuple for many objects": b"\x80\x02ctorch\nSize\nq\x00("
    + b"N" * 10_000
    + b"tq\x01("
    + b"h\x00h\x01\x81" * 2000
    + b"t.",
    "deep": b"\x80\x02)" + b"\x85" * 50_000 + b".",
    "deep objects": b"\x80\x02ctorch\nSize\nq\x00)q\x01" + b"h\x00h\x01R\x85q\x01" * 10**4 + b".",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_pickles_are_refused(name):
    with pytest.raises(CheckpointError, match="damaged"):
        read_pickle(DAMAGED[name], {("torch", "Size")})


@pytest.mark.parametrize("name", LARGE)
def test_a_pickle_takes_little_memory_whatever_it_says(name):
    tracemalloc.start()
    try:
        read_pickle(LARGE[name], {("torch", "Size")})
        assert tracemalloc.get_traced_memory()[1] < 1000 * len(LARGE[name])
    finally:
        tracemalloc.stop()


DATA_INSTRUCTIONS = {
    *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1"),
    *(
        "BINFLOAT",
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "BINUNICODE8",
        "EMPTY_TUPLE",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
    ),
    *("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS", "MEMOIZE", "BINPUT", "LONG_BINPUT"),
    *("BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"),
}


def test_instructions_that_describe_no_data_are_refused(extension):
    names = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
    for code in (code for code in range(256) if names.get(code) not in DATA_INSTRUCTIONS):
        for prepared in (b"", b"ctorch\nSize\n)", b"ctorch\nSize\n)}", b"(ctorch\nSize\nN", b"N"):
            for argument in (b"", b"\xf0", b"\xf0\x00\x00\x00", bytes(8), b"os\nsystem\n"):
                data = b"\x80\x04" + prepared + bytes([code]) + argument + b"."
                with pytest.raises(CheckpointError, match="is no instruction that describes data"):
                    read_pickle(data, (), trust=True, persistent=True)


def test_lone_surrogates_are_read_as_pickle_reads_them():
    for protocol in (2, 3, 4, 5):
        assert read_pickle(pickle.dumps({"\ud800": ["\udfff\ud800"]}, protocol), ()) == {"\ud800": ["\udfff\ud800"]}


MUTATED = 5000
INERT = {type(None), bool, int, float, str, tuple, list, dict, collections.OrderedDict, Global, PickledCall}


def mutated_pickles(canary):
    """Random edits of good and of harmful pickles, and random sequences of instructions."""
    choices = random.Random(0)
    values = [torch.Size([1, 2]), {"a": [1, 2.5, None, True], 3: (1, 2, 3, 4)}, collections.OrderedDict(a=-5, b=10**20)]
    seeds = [METADATA, *(pickle.dumps(values, protocol) for protocol in range(2, 6))]
    seeds += [zipfile.ZipFile(io.BytesIO(saved(torch.zeros(2, 3)))).read("archive/data.pkl")]
    seeds += [data for _, data in harmful(canary)]
    codes = [ord(opcode.code) for opcode in pickletools.opcodes]
    globals_ = [b"cos\nsystem\n", b"cbuiltins\neval\n", b"ccollections\nOrderedDict\n", text("touch " + str(canary))]
    for number in range(MUTATED):
        if number % 4 == 0:
            parts = [
                choices.choice(
                    [bytes([choices.choice(codes)]), choices.choice(globals_), b"(", b")", b"]", b"}", b"\x94"]
                )
                for _ in range(choices.randrange(40))
            ]
            yield b"\x80\x04" + b"".join(parts) + b"."
            continue
        data = bytearray(choices.choice(seeds))
        for _ in range(choices.choice([1, 1, 2, 5, 20])):
            at = choices.randrange(len(data))
            new = bytes([choices.choice([choices.randrange(256), choices.choice(codes)])])
            data[at : at + choices.randrange(3)] = choices.choice([new, new, b"", choices.choice(globals_)])
        yield bytes(data)


def read_mutations(canary):
    """Returns the number of pickles that were read, and what Python saw happen while they were."""
    events, read = [], 0
    pickles = list(mutated_pickles(canary))
    with contextlib.suppress(CheckpointError):
        read_pickle(pickles[0], ())  # whatever is imported at its first use
    watched = False
    watch = ("import", "pickle.find_class", "open", "exec", "compile", "os.", "subprocess.", "ctypes.", "socket.")
    sys.addaudithook(lambda event, _: events.append(event) if watched and event.startswith(watch) else None)
    tracemalloc.start()
    for data in pickles:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        watched = True
        try:
            found = read_pickle(data, (), trust=True, persistent=True)
        except CheckpointError:
            found = None
        else:
            read += 1
        finally:
            watched = False
        grown = tracemalloc.get_traced_memory()[1] - before
        assert grown < 20_000 + 1000 * len(data), (data, grown)
        assert types_in(found) <= INERT, data
    return read, events


def types_in(value):
    """Returns the types of everything in a value that may contain itself."""
    left, seen = [value], {}
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, tuple | list):
            left += value
        elif isinstance(value, PickledCall):
            left += [value.name, value.arguments, value.state]
    return {type(value) for value in seen.values()}


def test_mutated_pickles_are_inert_or_refused(tmp_path, extension):
    canary = tmp_path / "canary"
    read, events = run_alone(read_mutations, canary, timeout=120)
    assert read > MUTATED / 50
    assert events == []
    assert not canary.exists()


def test_a_list_referred_to_many_times_is_refused():
    metadata = pickle.loads(metadata_of((0,), [Box((0,), (0,))] * 1000))
    entry = metadata.state_dict_metadata["w"]
    read_stock_metadata(pickle.dumps(metadata))
    metadata.state_dict_metadata = {f"w{n}": entry for n in range(1000)}
    with pytest.raises(CheckpointError, match="more chunks than it has bytes"):
        read_stock_metadata(pickle.dumps(metadata))


def test_compressed_records_are_refused():
    deflated = with_description(b"N." * 100, zipfile.ZIP_DEFLATED)
    relabelled = bytearray(with_description(b"N."))
    relabelled[relabelled.index(b"PK\x01\x02") + 10] = zipfile.ZIP_DEFLATED
    for data in (deflated, bytes(relabelled)):
        with pytest.raises(CheckpointError, match="compressed"):
            item_object(data)


def test_records_at_the_same_bytes_are_refused():
    data = with_description(bytes(10**5))
    start = data.index(b"PK\x01\x02")
    first = data[start : data.index(b"PK\x01\x02", start + 1)]
    end = bytearray(data[data.index(b"PK\x05\x06") :])
    end[8:20] = struct.pack("<2H2L", 1000, 1000, 1000 * len(first), start)
    with pytest.raises(CheckpointError, match="overlap"):
        item_object(data[:start] + first * 1000 + bytes(end))


def test_a_size_beyond_the_payload_is_refused():
    described = zipfile.ZipFile(io.BytesIO(saved(torch.zeros(1)))).read("archive/data.pkl")
    huge = described.replace(b"K\x01\x85", b"J\xff\xff\xff\x7f\x85", 1)
    assert huge != described
    with pytest.raises(CheckpointError, match="are needed"):
        item_tensor(with_description(huge), torch.float32, (2**31 - 1,))
