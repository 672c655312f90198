"""Reads and validates ``.metadata``, in which torch.distributed.checkpoint (DCP) lists the tensors of a checkpoint.

DCP's own reader unpickles the file, which runs whatever code is in it, and believes the numbers in it. This module
reads the file with `read_pickle` of `checkpoint/stock/pickle_reader.py`, which runs nothing. It validates all shapes,
boxes, files and lengths, so that code that reads the tensors can rely on them.
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
from dist_asgd.checkpoint.format.dtypes import DTYPES
from dist_asgd.checkpoint.format.entries import SavedTensor
from dist_asgd.checkpoint.format.manifest import MANIFEST, MAX_PATH
from dist_asgd.checkpoint.stock.pickle_reader import DTYPE_GLOBALS, Call, Global, read_pickle, short

MAX_METADATA = 2**28  # bytes. Reading takes up to a hundred times as much memory; a chunk takes about a hundred bytes
MAX_DIMS = 64  # torch's own limit
MAX_CUT_DIMS = 8  # dimensions in which one tensor may be cut: `_check_cover` visits 2**8 corners of each box

_METADATA = "torch.distributed.checkpoint.metadata"
_OLD_METADATA = "torch.distributed._shard.sharded_tensor.metadata"  # before torch 2.4
_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")  # StorageMeta has the directory's path
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
    """Shape and dtype of a tensor in a DCP checkpoint, and where its parts are stored."""

    saved: SavedTensor
    chunks: tuple[StoredChunk, ...]  # their boxes cover each element of the tensor exactly once; none is empty


@dataclass(frozen=True, slots=True)
class StockCheckpoint:
    """Contents of a DCP checkpoint. The keys are DCP's names of entries, such as "model.weight"."""

    tensors: Mapping[str, StockTensor]
    objects: Mapping[str, StoredObject]  # values that are no tensors
    paths: Mapping[str, tuple[str | int, ...]]  # for each key of both: its path in the nested state that was saved


def check_metadata_size(size: int) -> None:
    """Raises ``CheckpointError`` for a size in bytes of ``.metadata`` that is too large to be read."""
    if size > MAX_METADATA:
        raise CheckpointError(f"the metadata has {size} bytes, expected at most {MAX_METADATA}")


def read_stock_metadata(data: bytes, trust: bool = False, *, committed: bool = False) -> StockCheckpoint:
    """Returns the contents of a DCP checkpoint that its ``.metadata`` lists. Runs nothing, whatever ``trust`` is.

    Args:
        data: the bytes of the file, which any release of torch from 2.0 on may have written.
        trust: accepts a file that names classes which DCP itself does not write, as other planners than DCP's may.
        committed: accepts a file that a save of this library wrote; the caller has found the manifest beside it.

    Raises:
        NotCommitted: a save of this library wrote the file, and ``committed`` is false.
        CheckpointError: the file is damaged, is larger than 256 MiB, names classes that are not trusted, or contradicts
            itself: boxes overlap, leave gaps or lie outside of their tensor, a path leads out of the checkpoint's
            directory, a chunk has no place or too few bytes there.
    """
    check_metadata_size(len(data))
    fields = _fields(read_pickle(data, _ALLOWED, trust=trust), "Metadata", "the metadata")
    if COMMITTED_BY in fields and not committed:
        raise NotCommitted(
            f"this checkpoint of dist_asgd has no {MANIFEST}, which is written when all ranks have saved, and deleted "
            "first: it was never finished, or is being deleted"
        )
    described = _expect(fields.get("state_dict_metadata"), dict, "state_dict_metadata")
    places = _places(_expect(fields.get("storage_data"), dict, "storage_data"))
    tensors: dict[str, StockTensor] = {}
    objects: dict[str, StoredObject] = {}
    budget = len(data)  # number of chunks that are accepted: a pickle may refer to one list any number of times
    for key, entry in described.items():
        _expect(key, str, "a key of state_dict_metadata")
        if isinstance(entry, Call) and entry.name == f"{_METADATA}.BytesStorageMetadata":
            if (key, None) not in places:
                raise CheckpointError(
                    f"{key!r}: the metadata does not say where it is stored: a writer failed at saving"
                )
            objects[key] = places[key, None]
            continue
        tensor = _fields(entry, "TensorStorageMetadata", f"the entry of {key!r}")
        budget -= len(_expect(tensor.get("chunks"), list, f"chunks of {key!r}"))
        if budget < 0:
            raise CheckpointError("the metadata lists more chunks than it has bytes: it is damaged, or made to do harm")
        tensors[key] = _tensor(key, tensor, places)
    return StockCheckpoint(tensors, objects, _paths(fields.get("planner_data"), described))


def _paths(planner_data: Any, keys: Iterable[str]) -> dict[str, tuple[str | int, ...]]:
    """Returns the path of each key: the path that the planner's data give, or else the key as the only name."""
    known = planner_data if isinstance(planner_data, dict) else {}
    paths: dict[str, tuple[str | int, ...]] = {}
    for key in keys:
        path: Any = known.get(key)
        is_path = isinstance(path, tuple) and len(path) <= MAX_PATH and all(type(part) in (str, int) for part in path)
        paths[key] = path if is_path and ".".join(map(str, path)) == key else (key,)
    return paths


def _tensor(key: str, fields: Mapping[str, Any], places: _Places) -> StockTensor:
    saved = SavedTensor(_sizes(fields.get("size"), f"size of {key!r}"), _dtype(key, fields.get("properties")))
    chunks = []
    for entry in fields["chunks"]:
        chunk = _fields(entry, "ChunkStorageMetadata", f"a chunk of {key!r}")
        offsets, sizes = (_sizes(chunk.get(name), f"{name} of a chunk of {key!r}") for name in ("offsets", "sizes"))
        box = Box(offsets, sizes)
        if box.numel == 0:  # DCP lists one for every rank without a part of the tensor, several at the same offsets
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
    if not isinstance(properties, Call) or properties.name not in (
        f"{_METADATA}.TensorProperties",
        f"{_OLD_METADATA}.TensorProperties",
    ):
        raise CheckpointError(f"{where} are {short(properties)}, expected TensorProperties")
    state = properties.state
    # torch 2.15 appends a sixth field, the strides of a tensor that one of the ranks saved. Neither torch nor this
    # reader uses them: the item of each chunk has its own.
    if not isinstance(state, tuple) or len(state) not in (5, 6):
        raise CheckpointError(f"{where} have the state {short(state)}, expected a tuple of 5 or 6")
    dtype, layout = state[:2]
    found = DTYPES.get(dtype.name.removeprefix("torch.")) if isinstance(dtype, Global) else None
    if found is None:
        raise CheckpointError(f"{where} have the dtype {short(dtype)}, of which this torch reads no tensors")
    if not isinstance(layout, Call) or layout.arguments != ("torch.strided",):
        raise CheckpointError(f"{where} have another layout than torch.strided; only dense tensors can be read")
    return found


_Places = dict[tuple[str, tuple[int, ...] | None], StoredObject]


def _places(storage: Mapping[Any, Any]) -> _Places:
    """Returns where each chunk is stored, by key and offsets of the chunk. Values have None instead of offsets."""
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


def _path(value: Any, where: str) -> str:
    path: str = _expect(value, str, f"relative_path in {where}")
    if "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise CheckpointError(f"{where} is the file {short(path)}, expected one inside of the checkpoint's directory")
    return path


def _sizes(value: Any, where: str) -> tuple[int, ...]:
    if isinstance(value, Call) and value.name == "torch.Size" and len(value.arguments) == 1:
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
    """Returns the attributes of a pickled object, whose class must be called ``name`` in whatever module."""
    if not isinstance(value, Call) or value.name.rpartition(".")[2] != name:
        raise CheckpointError(f"{where} is {short(value)}, expected a {name}")
    state: dict[str, Any] = _expect(value.state, dict, f"the state of {where}")
    return state


def _check_cover(key: str, shape: tuple[int, ...], boxes: Sequence[Box]) -> None:
    """Raises CheckpointError unless every element of a tensor of ``shape`` is in exactly one box.

    Let f be the function that counts the boxes in which an element is. The differences of f along all dimensions are
    non-zero only at corners of boxes, with alternating signs, and they determine f. So f is 1 in the whole tensor if
    and only if the signed corners of all boxes add up to the signed corners of the tensor. This takes time in
    proportion to the number of boxes, while a comparison of all pairs would take the square of it.
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
    """Yields each corner of a box, given as [start, stop) along each dimension, with the sign of the corner."""
    for ends in itertools.product((0, 1), repeat=len(ranges)):
        yield tuple([span[end] for span, end in zip(ranges, ends, strict=True)]), (-1) ** sum(ends)
