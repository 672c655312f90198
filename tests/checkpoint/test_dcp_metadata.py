"""Checks that torch.load and torch.distributed.checkpoint read the items and metadata that this library makes."""

import io
import itertools
import pickle
import zipfile

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

from dist_asgd.boxes import Box, boxes
from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.format.dcp_metadata import (
    MAX_PAYLOAD,
    StoredChunk,
    StoredObject,
    item_head,
    item_tail,
    object_item,
    stock_metadata,
)
from dist_asgd.checkpoint.format.torch_archive import PAYLOAD_ALIGNMENT
from tests.support.items import DTYPES, SHAPES, item, raw_bytes, sample
from tests.support.ranks import run_alone, run_ranks


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_loads_an_item(dtype, tmp_path):
    for shape in SHAPES:
        tensor = sample(dtype, shape)
        data = item(tensor)
        assert len(item_head(dtype, shape)) % PAYLOAD_ALIGNMENT == 0
        (tmp_path / "item").write_bytes(data)
        for loaded in (
            torch.load(io.BytesIO(data), weights_only=True),
            torch.load(tmp_path / "item", weights_only=True, mmap=True),
        ):
            assert loaded.dtype == dtype and loaded.shape == tensor.shape and loaded.stride() == tensor.stride()
            assert raw_bytes(loaded) == raw_bytes(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_description_is_the_one_torch_save_writes(dtype):
    for shape in SHAPES:
        tensor, buffer = sample(dtype, shape), io.BytesIO()
        torch.save(tensor, buffer)
        theirs = zipfile.ZipFile(buffer)
        ours = zipfile.ZipFile(io.BytesIO(item(tensor)))
        for name in ours.namelist():
            assert ours.read(name) == theirs.read(name), name


def test_zip_readers_check_the_payload():
    data = bytearray(item(sample(torch.float32, (4, 5))))
    assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None
    head = len(item_head(torch.float32, (4, 5)))
    for bit in (0, 333, 8 * 80 - 1):
        data[head + bit // 8] ^= 1 << bit % 8
        assert zipfile.ZipFile(io.BytesIO(data)).testzip() == "archive/data/0"
        data[head + bit // 8] ^= 1 << bit % 8


def test_an_item_has_little_besides_its_payload():
    assert len(item(torch.zeros(()))) < 800  # torch.save: 1573


def test_more_than_a_gibibyte_is_refused():
    item_head(torch.uint8, (MAX_PAYLOAD,))
    for part in (item_head, lambda *args: item_tail(*args, 0)):
        with pytest.raises(CheckpointError, match="smaller boxes"):
            part(torch.float32, (MAX_PAYLOAD // 4 + 1,))


# --- whole checkpoints ---

VALUES = {"lr": 0.1, "names": ["a", "ß"], "none": None, "nested": {"1": True}}


def originals():
    return {
        "w": sample(torch.bfloat16, (5, 7), 1),
        "same": sample(torch.bfloat16, (5, 7), 1),
        "x": sample(torch.int64, (3, 4, 5), 2),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "f8": sample(torch.float8_e5m2, (9,), 3),
    }


def cut(tensor, parts):
    """Returns (box, block) of `parts` flat ranges of a tensor, as a sharded optimizer holds them."""
    if not tensor.numel():
        return [(Box((0,) * tensor.dim(), tuple(tensor.shape)), tensor)]
    bounds = [tensor.numel() * n // parts for n in range(parts + 1)]
    found = []
    for start, stop in itertools.pairwise(bounds):
        for box in boxes(tuple(tensor.shape), start, stop):
            where = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
            found.append((box, tensor[where]))
    return found


def write_checkpoint(folder):
    """Writes tensors in boxes over two files, "same" in the place of "w", and values; all under the key "state"."""
    files = {"__0_0.distcp": b"", "sub/__1_0.distcp": b""}
    (folder / "sub").mkdir()
    tensors, objects, places = {}, {}, {}
    for name, tensor in originals().items():
        chunks = []
        for n, (box, block) in enumerate(cut(tensor, 3)):
            data = item(block)
            if data not in places:
                path = list(files)[n % 2]
                places[data] = (path, len(files[path]), len(data))
                files[path] += data
            chunks.append(StoredChunk(box, *places[data]))
        tensors[f"state.{name}"] = (tensor.dtype, tuple(tensor.shape), chunks)
    for name, value in VALUES.items():
        data = object_item(value)
        objects[f"state.{name}"] = StoredObject("__0_0.distcp", len(files["__0_0.distcp"]), len(data))
        files["__0_0.distcp"] += data
    paths = {key: ("state", key.removeprefix("state.")) for key in (*tensors, *objects)}
    for path, data in files.items():
        (folder / path).write_bytes(data)
    (folder / ".metadata").write_bytes(stock_metadata(tensors, objects, paths))


@pytest.fixture
def checkpoint(tmp_path):
    write_checkpoint(tmp_path)
    return tmp_path


def check(state):
    for name, tensor in originals().items():
        assert raw_bytes(state[name]) == raw_bytes(tensor), name
    assert {name: state[name] for name in VALUES} == VALUES


def test_dcp_loads_dense_tensors(checkpoint):
    state = {name: torch.zeros_like(tensor) for name, tensor in originals().items()} | dict.fromkeys(VALUES, 0)
    run_alone(load_dense, checkpoint, state)


def load_dense(folder, state):
    dcp.load({"state": state}, storage_reader=dcp.FileSystemReader(folder))
    check(state)


def test_dcp_loads_dtensors_on_two_ranks(checkpoint):
    run_ranks(2, load_sharded, checkpoint)


def load_sharded(rank, folder):
    mesh = DeviceMesh("cpu", range(dist.get_world_size()))
    state = dict.fromkeys(VALUES, 0)
    for name, tensor in originals().items():
        state[name] = torch.zeros_like(tensor)
        if tensor.dim():
            state[name] = distribute_tensor(state[name], mesh, [Shard(0)], src_data_rank=None)
    dcp.load({"state": state}, storage_reader=dcp.FileSystemReader(folder))
    for name, tensor in originals().items():
        if tensor.dim():
            expected = distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None).to_local()
            assert raw_bytes(state[name].to_local()) == raw_bytes(expected), name
        else:
            assert torch.equal(state[name], tensor)


def test_it_converts_to_torch_save(checkpoint, tmp_path):
    run_alone(dcp_to_torch_save, checkpoint, tmp_path / "dense.pt")
    check(torch.load(tmp_path / "dense.pt", weights_only=True)["state"])


def test_metadata_depends_on_the_values_alone():
    def build(copy):
        chunks = [StoredChunk(Box((0, 2), (1, 1)), copy("lr"), 3, 600)]
        return stock_metadata(
            {copy("a.lr"): (torch.float32, (1, 3), chunks)},
            {copy("a.b"): StoredObject(copy("a.lr"), 0, 9)},
            {copy("a.lr"): (copy("a"), copy("lr"), 0), copy("a.b"): (copy("a"), copy("1.0.0"))},
        )

    one, other = build(lambda text: text), build(lambda text: "".join(list(text)))
    assert one == other
    assert isinstance(pickle.loads(one), Metadata)
