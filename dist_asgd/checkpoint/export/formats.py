"""Files of tensors that others read: that of ``torch.save``, and safetensors."""

from __future__ import annotations

import itertools
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import torch

from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.format.manifest import dtype_name
from dist_asgd.checkpoint.format.torch_archive import (
    Stub,
    beginning,
    description,
    directory,
    payload_bytes,
    payload_record,
)

# The names of dtypes in safetensors: those that its library for torch reads.
SAFETENSORS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "complex64": "C64",
    "bool": "BOOL",
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
}
METADATA = "__metadata__"  # in the header of safetensors, beside names of tensors
ALIGNMENT = 8  # bytes, of the header of safetensors


@dataclass(frozen=True, slots=True)
class Exported:
    """A tensor of the file."""

    name: str
    key: str  # where it comes from
    shape: tuple[int, ...]
    dtype: torch.dtype  # in the file; a checkpoint may have a wider one
    ties: tuple[str, ...] = ()  # other names of the same tensor, for formats in which it can have several

    @property
    def nbytes(self) -> int:
        return payload_bytes(self.dtype, self.shape)


class Payloads(Protocol):
    """Where tensors come from."""

    def payloads(self, tensors: Sequence[Exported]) -> Iterator[tuple[int, memoryview]]:
        """(number of the tensor, a part of its elements in row-major order), one after another."""


FileOf: TypeAlias = Callable[[Payloads, Sequence[Exported]], Iterator[bytes | memoryview]]


def safetensors_dtype(tensor: Exported) -> str:
    """What safetensors calls it. Raises ``CheckpointError`` for dtypes and names that the format does not have."""
    kind = SAFETENSORS.get(dtype_name(tensor.dtype))
    if kind is None or tensor.name == METADATA:
        wrong = "is a name that safetensors keeps for itself" if kind else f"is {dtype_name(tensor.dtype)}"
        raise CheckpointError(f"{tensor.name!r} {wrong}, which safetensors cannot hold: export it for torch")
    return kind


def safetensors_file(source: Payloads, tensors: Sequence[Exported]) -> Iterator[bytes | memoryview]:
    """A file of safetensors: https://huggingface.co/docs/safetensors. Larger elements stand first: all are aligned.

    Raises:
        CheckpointError: for dtypes and names that the format does not have, and for damaged bytes.
    """
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {METADATA: {"format": "pt"}}
    at = 0
    for tensor in tensors:
        offsets = [at, at := at + tensor.nbytes]
        header[tensor.name] = {
            "dtype": safetensors_dtype(tensor),
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    yield struct.pack("<Q", len(text)) + text
    for _, data in source.payloads(tensors):
        yield data


def torch_file(source: Payloads, tensors: Sequence[Exported]) -> Iterator[bytes | memoryview]:
    """What ``torch.save`` makes of a dict of the tensors. Raises ``CheckpointError`` for damaged bytes."""
    stubs = {
        name: Stub(number, tensor.dtype, tensor.shape)
        for number, tensor in enumerate(tensors)
        for name in (tensor.name, *tensor.ties)
    }
    head, records = beginning(description(stubs))
    yield head
    at, parts = len(head), source.payloads(tensors)
    for number, pieces in itertools.groupby(parts, key=lambda part: part[0]):
        record = payload_record(number, at, tensors[number].nbytes)
        yield record.local_header()
        crc = 0
        for _, data in pieces:
            crc = zlib.crc32(data, crc)
            yield data
        record = replace(record, crc32=crc)
        yield record.descriptor()
        records.append(record)
        at += len(record.local_header()) + record.nbytes + len(record.descriptor())
    yield directory(records, at)


FORMATS: dict[str, FileOf] = {"torch": torch_file, "safetensors": safetensors_file}
SUFFIXES = {".pt": "torch", ".pth": "torch", ".bin": "torch", ".safetensors": "safetensors"}


def format_by(url: str) -> str | None:
    """The format that the suffix of a file means."""
    address = url.partition("?")[0] if "://" in url else url
    return next((name for suffix, name in SUFFIXES.items() if address.endswith(suffix)), None)
