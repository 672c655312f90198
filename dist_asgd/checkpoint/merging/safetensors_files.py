"""Reads the headers of safetensors files, and finds the files of a directory in the layout of Hugging Face.

The format is that of https://huggingface.co/docs/safetensors. It has no checksums. Headers are trusted in nothing.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import torch

from dist_asgd.boxes import whole
from dist_asgd.checkpoint.errors import CheckpointError, naming
from dist_asgd.checkpoint.export.formats import METADATA, SAFETENSORS
from dist_asgd.checkpoint.format.entries import SavedTensor
from dist_asgd.checkpoint.format.torch_archive import payload_bytes
from dist_asgd.checkpoint.merging.payload import Payload, SourceTensor
from dist_asgd.checkpoint.storage.storage import Storage

MAX_HEADER = 10**8  # bytes, the limit of the safetensors library
MAX_INDEX = 10**8  # bytes of an index file
INDEX_SUFFIX = ".safetensors.index.json"
SUFFIX = ".safetensors"

_DTYPES = {name: getattr(torch, dtype) for dtype, name in SAFETENSORS.items() if hasattr(torch, dtype)}


def files_in(storage: Storage, names: Mapping[str, int | None]) -> list[str]:
    """Returns the files of safetensors in a directory of Hugging Face: those of its index, or else the only one.

    Args:
        storage: the directory.
        names: what ``storage.list()`` returned.

    Raises:
        CheckpointError: there are several, or the index is not valid.
    """
    indices = [name for name in names if name.endswith(INDEX_SUFFIX)]
    files = [name for name in names if name.endswith(SUFFIX)]
    if len(indices) == 1:
        return _files_of_index(storage, indices[0], names)
    if len(indices or files) != 1:
        found = sorted(indices or files)
        raise CheckpointError(f"{storage.url} has {len(found)} models, {', '.join(found[:5])}: name one of the files")
    return files


def _files_of_index(storage: Storage, index: str, names: Mapping[str, int | None]) -> list[str]:
    if (names[index] or 0) > MAX_INDEX:
        raise CheckpointError(f"{storage.url}/{index} has {names[index]} bytes, more than any index: {MAX_INDEX}")
    try:
        files = sorted(set(json.loads(storage.read(index))["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{storage.url}/{index} is no index of safetensors: {error!r}") from error
    if missing := [name for name in files if not isinstance(name, str) or names.get(name) is None]:
        raise CheckpointError(f"{storage.url}/{index} names files that are not there: {missing[:5]}")
    return files


def tensors_of_file(storage: Storage, name: str, size: int) -> dict[str, SourceTensor]:
    """Returns the tensors of a safetensors file by name.

    Args:
        size: bytes of the file.

    Raises:
        CheckpointError: the header is not valid, or has a dtype that torch does not have.
    """
    with naming(f"{storage.url}/{name} is no sound file of safetensors"):
        ((_, start),) = storage.read_ranges([(name, 0, min(8, size))])
        length = int.from_bytes(start, "little")
        if len(start) < struct.calcsize("<Q") or not 2 <= length <= min(MAX_HEADER, size - 8):
            raise CheckpointError(f"its header has {length} bytes of {size}")
        ((_, text),) = storage.read_ranges([(name, 8, 8 + length)])
        try:
            header = json.loads(text)
            entries = {key: entry for key, entry in header.items() if key != METADATA}
        except (ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"its header is no JSON object: {error}") from error
        tensors = {key: _tensor(key, entry, name, 8 + length, size) for key, entry in entries.items()}
    return tensors


def _tensor(key: str, entry: Any, file: str, start: int, size: int) -> SourceTensor:
    match entry:
        case {"dtype": str(kind), "shape": list(shape), "data_offsets": [int(first), int(last)]}:
            dtype = _DTYPES.get(kind)
        case _:
            raise CheckpointError(f"the entry of {key!r} is {str(entry)[:200]}")
    if dtype is None:
        raise CheckpointError(f"{key!r} has the dtype {kind}, which is none of {', '.join(_DTYPES)}")
    if not all(type(length) is int and 0 <= length < 2**63 for length in shape):
        raise CheckpointError(f"{key!r} has the shape {str(shape)[:200]}")
    if first < 0 or last - first != payload_bytes(dtype, shape) or start + last > size:
        raise CheckpointError(f"{key!r}, {kind} of shape {shape}, is said to be at bytes {first} to {last} of {size}")
    return SourceTensor(SavedTensor(tuple(shape), dtype), (Payload(whole(shape), file, start + first),))
