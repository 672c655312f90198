"""Writes named tensors in file formats that other programs read: the format of ``torch.save``, and safetensors.

A format is a function that yields the bytes of a file in order. The elements of tensors come from a `PayloadSource` in
small parts, so that no tensor has to be in memory as a whole.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import torch

from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.format.crc32 import crc32
from dist_asgd.checkpoint.format.entries import dtype_name
from dist_asgd.checkpoint.format.torch_archive import (
    Stub,
    beginning,
    description,
    directory,
    payload_bytes,
    payload_record,
)

# Names of dtypes in safetensors, by torch's names. The list has the dtypes that safetensors.torch reads.
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
METADATA = "__metadata__"  # key in the header of safetensors that is no name of a tensor
HEADER_ALIGNMENT = 8  # bytes; the header of safetensors is padded to a multiple of it
BATCH_BYTES = 16 * 2**20  # bytes of tensors that a source reads or gathers at once


@dataclass(frozen=True, slots=True)
class Exported:
    """Tensor of an exported file."""

    name: str  # in the file
    key: str  # the source's name of the tensor whose elements are written
    shape: tuple[int, ...]
    dtype: torch.dtype  # in the file; the source may have the elements in a wider dtype and rounds them
    ties: tuple[str, ...] = ()  # further names of a tied weight, for formats in which a tensor can have several

    @property
    def nbytes(self) -> int:
        return payload_bytes(self.dtype, self.shape)


class PayloadSource(Protocol):
    """Source of the elements of tensors: a checkpoint, or a live model on all ranks."""

    def payloads(self, tensors: Sequence[Exported]) -> Iterator[tuple[int, memoryview]]:
        """Yields the elements of all ``tensors`` in small parts, tensor after tensor, in row-major order.

        Yields pairs of the index of a tensor in ``tensors`` and the bytes of the next part in the tensor's dtype. A
        tensor without elements has one empty part.

        Raises:
            CheckpointError: elements could not be read or are damaged.
        """


FileFormat: TypeAlias = Callable[[PayloadSource, Sequence[Exported]], Iterator[bytes | memoryview]]


def safetensors_dtype(tensor: Exported) -> str:
    """Returns the name of the tensor's dtype in safetensors.

    Raises:
        CheckpointError: safetensors cannot hold this dtype, or reserves this name.
    """
    kind = SAFETENSORS.get(dtype_name(tensor.dtype))
    if kind is None or tensor.name == METADATA:
        wrong = "is a name that safetensors keeps for itself" if kind else f"is {dtype_name(tensor.dtype)}"
        raise CheckpointError(f"{tensor.name!r} {wrong}, which safetensors cannot hold: export it for torch")
    return kind


def safetensors_file(source: PayloadSource, tensors: Sequence[Exported]) -> Iterator[bytes | memoryview]:
    """Yields the bytes of a file in the format of https://huggingface.co/docs/safetensors. Ignores ``ties``.

    Tensors are written in the order of the size of their elements, largest first, so that all elements are aligned.

    Raises:
        CheckpointError: safetensors cannot hold a dtype or name, or ``source`` found elements damaged.
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
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    yield struct.pack("<Q", len(text)) + text
    for _, data in source.payloads(tensors):
        yield data


def torch_file(source: PayloadSource, tensors: Sequence[Exported]) -> Iterator[bytes | memoryview]:
    """Yields the bytes of a file that ``torch.load(weights_only=True)`` reads as a dict of CPU tensors by name.

    Tied weights are in the dict under all their names and share memory when the file is loaded.

    Raises:
        CheckpointError: ``source`` found elements damaged.
    """
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
            crc = crc32(data, crc)
            yield data
        record = replace(record, crc32=crc)
        yield record.descriptor()
        records.append(record)
        at += len(record.local_header()) + record.nbytes + len(record.descriptor())
    yield directory(records, at)


FORMATS: dict[str, FileFormat] = {"torch": torch_file, "safetensors": safetensors_file}
SUFFIXES = {".pt": "torch", ".pth": "torch", ".bin": "torch", ".safetensors": "safetensors"}


def format_by(url: str) -> str | None:
    """Returns the key in FORMATS that the suffix of a URL or path stands for, or None for any other suffix."""
    address = url.partition("?")[0] if "://" in url else url
    return next((name for suffix, name in SUFFIXES.items() if address.endswith(suffix)), None)
