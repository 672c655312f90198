"""Checkpoints that ``torch.distributed.checkpoint`` (DCP) wrote: what they hold and where, read without trusting them.

The stock reader unpickles ``.metadata``, which runs what is in it, and believes the numbers in it. Here it is read
by `read_pickle`, which runs nothing, and whatever it says of shapes, boxes, files and lengths is checked, so that
who reads the tensors can rely on it.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_asgd.boxes import Box
from dist_asgd.checkpoint.errors import CheckpointError, NotCommitted
from dist_asgd.checkpoint.format.dcp_metadata import COMMITTED_BY, StoredChunk, StoredObject
from dist_asgd.checkpoint.format.entries import SavedTensor
from dist_asgd.checkpoint.format.manifest import MAX_PATH_NAMES, NAME
from dist_asgd.checkpoint.stock.pickle_reader import DTYPE_GLOBALS, DTYPES, Global, Node, read_pickle, short

MAX_METADATA = 2**28  # bytes. Reading takes up to a hundred times as much; a chunk takes about a hundred bytes
MAX_DIMS = 64  # torch's own limit
MAX_CUT_DIMS = 8  # dimensions in which one tensor is cut; a box has two to the power of it corners

_METADATA = "torch.distributed.checkpoint.metadata"
_OLD_METADATA = "torch.distributed._shard.sharded_tensor.metadata"  # before torch 2.4
_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")  # of the directory that was saved to
_CLASSES = (
    "Metadata",
    "TensorStorageMetadata",
    "TensorProperties",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "MetadataIndex",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
)
_ALLOWED = DTYPE_GLOBALS | {
    *((_METADATA, name) for name in _CLASSES),
    *((_OLD_METADATA, name) for name in ("TensorProperties", "MEM_FORMAT_ENCODING")),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in _PATHS),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("builtins", "getattr"),  # how some Python 3.11 pickle a member of an Enum
}


@dataclass(frozen=True, slots=True)
class StockTensor:
    saved: SavedTensor
    chunks: tuple[StoredChunk, ...]  # they cover the tensor without overlapping; none is empty


@dataclass(frozen=True, slots=True)
class StockCheckpoint:
    """By key."""

    tensors: Mapping[str, StockTensor]
    objects: Mapping[str, StoredObject]
    paths: Mapping[str, tuple[str | int, ...]]  # of both, in the nested state that was saved


def read_stock_metadata(data: bytes, trust: bool = False, *, committed: bool = False) -> StockCheckpoint:
    """What a stock checkpoint holds, from the bytes of its ``.metadata``. Nothing in it is run, whatever ``trust`` is.

    Args:
        data: the file. It may be of any release of torch from 2.0 on.
        trust: do not refuse what names classes that DCP itself does not write, as planners of others may.
        committed: it is that of a checkpoint of ours, and the manifest is there.

    Raises NotCommitted when it is of ours otherwise; CheckpointError when it is damaged, names such classes, or
    contradicts itself: boxes that overlap, leave gaps or lie outside of their tensor, files outside of the checkpoint,
    chunks with no place or one too small.
    """
    if len(data) > MAX_METADATA:
        raise CheckpointError(f"the metadata has {len(data)} bytes, more than {MAX_METADATA}")
    fields = _fields(read_pickle(data, _ALLOWED, trust=trust), "Metadata", "the metadata")
    if COMMITTED_BY in fields and not committed:
        raise NotCommitted(
            f"this checkpoint of dist_asgd has no {NAME}, which is written when all ranks have saved, and deleted "
            "first: it was never finished, or is being deleted"
        )
    described = _expect(fields.get("state_dict_metadata"), dict, "state_dict_metadata")
    places = _places(_expect(fields.get("storage_data"), dict, "storage_data"))
    tensors: dict[str, StockTensor] = {}
    objects: dict[str, StoredObject] = {}
    budget = len(data)  # for chunks: a list may be referred to any number of times
    for key, entry in described.items():
        _expect(key, str, "a key of state_dict_metadata")
        if isinstance(entry, Node) and entry.name == f"{_METADATA}.BytesStorageMetadata":
            objects[key] = _object_place(places, key)
            continue
        tensor = _fields(entry, "TensorStorageMetadata", f"the entry of {key!r}")
        budget -= len(_expect(tensor.get("chunks"), list, f"chunks of {key!r}"))
        if budget < 0:
            raise CheckpointError("the metadata lists more chunks than it has bytes: it is damaged, or made to do harm")
        tensors[key] = _tensor(key, tensor, places)
    return StockCheckpoint(tensors, objects, _paths(fields.get("planner_data"), described))


def _paths(found: Any, keys: Iterable[str]) -> dict[str, tuple[str | int, ...]]:
    """By the planner's data. Where there are none, as of other planners, a key is the path of its entry."""
    known = found if isinstance(found, dict) else {}
    paths: dict[str, tuple[str | int, ...]] = {}
    for key in keys:
        path: Any = known.get(key)
        is_path = isinstance(path, tuple) and len(path) <= MAX_PATH_NAMES and all(type(part) in (str, int) for part in path)
        paths[key] = path if is_path and ".".join(map(str, path)) == key else (key,)
    return paths


def _tensor(key: str, fields: Mapping[str, Any], places: _Places) -> StockTensor:
    saved = SavedTensor(_sizes(fields.get("size"), f"size of {key!r}"), _dtype(key, fields.get("properties")))
    chunks = []
    for entry in fields["chunks"]:
        chunk = _fields(entry, "ChunkStorageMetadata", f"a chunk of {key!r}")
        offsets, sizes = (_sizes(chunk.get(name), f"{name} of a chunk of {key!r}") for name in ("offsets", "sizes"))
        box = Box(offsets, sizes)
        if box.numel == 0:  # ranks without a part have such, several of them at the same offsets
            continue
        place = places.get((key, offsets))
        if place is None:
            raise CheckpointError(
                f"{key!r}: the metadata does not say where the chunk at {offsets} is stored: a writer failed while "
                "the checkpoint was saved"
            )
        if place.length < box.numel * saved.dtype.itemsize:
            raise CheckpointError(
                f"{key!r}: the chunk at {offsets} of sizes {sizes} and {saved.dtype} cannot be stored in "
                f"{place.length} bytes"
            )
        chunks.append(StoredChunk(box, place.path, place.offset, place.length))
    _check_cover(key, saved.shape, [chunk.box for chunk in chunks])
    return StockTensor(saved, tuple(chunks))


def _dtype(key: str, properties: Any) -> Any:
    where = f"the properties of {key!r}"
    if not isinstance(properties, Node) or properties.name not in (
        f"{_METADATA}.TensorProperties",
        f"{_OLD_METADATA}.TensorProperties",
    ):
        raise CheckpointError(f"{where} are {short(properties)}, expected TensorProperties")
    state = properties.state
    if not isinstance(state, tuple) or len(state) != 5:
        raise CheckpointError(f"{where} have the state {short(state)}, expected a tuple of 5")
    dtype, layout = state[:2]
    if not isinstance(dtype, Global) or dtype.name not in DTYPES:
        raise CheckpointError(f"{where} have the dtype {short(dtype)}, which this torch does not have")
    if not isinstance(layout, Node) or layout.arguments != ("torch.strided",):
        raise CheckpointError(f"{where} have another layout than torch.strided; only dense tensors can be read")
    return DTYPES[dtype.name]


_Places = dict[tuple[str, tuple[int, ...] | None], StoredObject]


def _places(storage: Mapping[Any, Any]) -> _Places:
    """(key, offsets) -> place; the offsets of values are None."""
    places: _Places = {}
    for index, info in storage.items():
        at = _fields(index, "MetadataIndex", "a key of storage_data")
        key = _expect(at.get("fqn"), str, "fqn in a key of storage_data")
        offsets = at.get("offset")
        where = f"the place of {key!r}"
        place = _fields(info, "_StorageInfo", where)
        if place.get("transform_descriptors"):
            raise CheckpointError(f"{key!r} is compressed: only torch's own reader, with its extension, can read it")
        places[key, None if offsets is None else _sizes(offsets, f"offset in a key of {key!r}")] = StoredObject(
            _path(place.get("relative_path"), where),
            _count(place.get("offset"), f"offset in {where}"),
            _count(place.get("length"), f"length in {where}"),
        )
    return places


def _object_place(places: _Places, key: str) -> StoredObject:
    place = places.get((key, None))
    if place is None:
        raise CheckpointError(f"{key!r}: the metadata does not say where it is stored: a writer failed at saving")
    return place


def _path(value: Any, where: str) -> str:
    path: str = _expect(value, str, f"relative_path in {where}")
    if "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise CheckpointError(f"{where} is the file {short(path)}, expected one inside of the checkpoint's directory")
    return path


def _sizes(value: Any, where: str) -> tuple[int, ...]:
    if isinstance(value, Node) and value.name == "torch.Size" and len(value.arguments) == 1:
        value = value.arguments[0]
    if not isinstance(value, tuple | list) or len(value) > MAX_DIMS:
        raise CheckpointError(f"{where}: {short(value)}, expected at most {MAX_DIMS} sizes")
    return tuple([_count(size, where) for size in value])


def _count(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise CheckpointError(f"{where} is {short(value)}, expected a number of 0 or more")
    return value


def _expect(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        raise CheckpointError(f"{where} is {short(value)}, expected a {kind.__name__}")
    return value


def _fields(value: Any, name: str, where: str) -> Mapping[str, Any]:
    """The attributes of an object of the class ``name`` of DCP."""
    if not isinstance(value, Node) or value.name.rpartition(".")[2] != name:
        raise CheckpointError(f"{where} is {short(value)}, expected a {name}")
    state: dict[str, Any] = _expect(value.state, dict, f"the state of {where}")
    return state


def _check_cover(key: str, shape: tuple[int, ...], boxes: Sequence[Box]) -> None:
    """Raises CheckpointError unless every element of the tensor is in exactly one box.

    Boxes are added up by their corners with alternating signs. That is the difference of their sum along every
    dimension, which determines the sum: so it is 1 everywhere exactly if what remains are the tensor's own corners.
    It takes time in proportion to the number of boxes, not to its square.
    """
    for box in boxes:
        if len(box.offsets) != len(shape) or len(box.sizes) != len(shape):
            raise CheckpointError(f"{key!r} has {len(shape)} dimensions, its chunk at {box.offsets} another number")
        if any(offset + size > whole for offset, size, whole in zip(box.offsets, box.sizes, shape, strict=True)):
            raise CheckpointError(f"{key!r}: the chunk at {box.offsets} of sizes {box.sizes} is not inside {shape}")
    if math.prod(shape) == 0:
        return
    cut = [dim for dim, size in enumerate(shape) if any(box.sizes[dim] != size for box in boxes)]
    if len(cut) > MAX_CUT_DIMS:
        raise CheckpointError(f"{key!r} is cut in {len(cut)} dimensions, more than {MAX_CUT_DIMS}")
    corners: Counter[tuple[int, ...]] = Counter()
    for box in boxes:
        for corner, sign in _corners([(box.offsets[dim], box.offsets[dim] + box.sizes[dim]) for dim in cut]):
            corners[corner] += sign
    for corner, sign in _corners([(0, shape[dim]) for dim in cut]):
        corners[corner] -= sign
    wrong = next((corner for corner, count in corners.items() if count), None)
    if wrong is not None:
        at = [0] * len(shape)
        for dim, position in zip(cut, wrong, strict=True):
            at[dim] = position
        raise CheckpointError(f"{key!r}: its chunks overlap or leave a gap at {tuple(at)} of {shape}")


def _corners(ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[tuple[int, ...], int]]:
    """Each corner of a box, with the sign of the difference there."""
    for ends in itertools.product((0, 1), repeat=len(ranges)):
        yield tuple([span[end] for span, end in zip(ranges, ends, strict=True)]), (-1) ** sum(ends)
