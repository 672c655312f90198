"""Writes merged weights: as a checkpoint of this library, a file of safetensors or of torch, or for transformers."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from dist_asgd.boxes import Box, cut, whole
from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.export.formats import FORMATS, format_by, safetensors_file
from dist_asgd.checkpoint.export.huggingface import MAX_SHARD_BYTES, WEIGHTS, split_into_files, write_directory
from dist_asgd.checkpoint.format.entries import SavedTensor
from dist_asgd.checkpoint.format.json_values import decode
from dist_asgd.checkpoint.format.manifest import MANIFEST, STOCK
from dist_asgd.checkpoint.format.torch_archive import payload_bytes
from dist_asgd.checkpoint.merging.mean import MeanSource
from dist_asgd.checkpoint.merging.sources import WeightSource
from dist_asgd.checkpoint.run.directories import directories_of
from dist_asgd.checkpoint.saving.assign import MAX_ITEM_BYTES
from dist_asgd.checkpoint.saving.commit import CommitRecord, commit
from dist_asgd.checkpoint.saving.writer import write_blocks
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.checkpoint.storage.url import folder_and_name

CHECKPOINT, HUGGING_FACE = "checkpoint", "huggingface"  # formats that are directories
TARGETS = (CHECKPOINT, HUGGING_FACE, *FORMATS)


@dataclass(frozen=True, slots=True)
class Target:
    """What a merge writes to."""

    format: str  # one of TARGETS
    storage: Storage  # the directory, or the one of the file
    name: str  # of the file; "" for a directory

    @property
    def url(self) -> str:
        """The URL, without credentials."""
        return f"{self.storage.url}/{self.name}" if self.name else self.storage.url


def open_target(url: str, open_storage: Callable[[str], Storage], format_name: str | None) -> Target:
    """Returns the target at ``url``. Makes no request.

    Args:
        open_storage: returns the files below a URL.
        format_name: one of TARGETS. None: by the suffix of a file; else Hugging Face's if the URL ends with a slash,
            and that of a checkpoint if it does not.

    Raises:
        ValueError: the URL is not valid.
    """
    chosen = format_name or format_by(url) or (HUGGING_FACE if url.endswith("/") else CHECKPOINT)
    if chosen in FORMATS:
        folder, name = folder_and_name(url)
        return Target(chosen, open_storage(folder), name)
    return Target(chosen, open_storage(url), "")


def check_absent(target: Target, url: str, open_storage: Callable[[str], Storage]) -> None:
    """Raises ``CheckpointError`` if there is something already that the merge would replace or become a part of."""
    names = target.storage.list()
    if target.name and target.name in names:
        raise CheckpointError(f"{target.url} exists: a merge replaces nothing. Remove it first, or take another name")
    if not target.name and {MANIFEST, STOCK} & names.keys():
        raise CheckpointError(f"{target.url} is a checkpoint: checkpoints are never overwritten. Take another URL")
    if target.format == CHECKPOINT and names:
        raise CheckpointError(f"{target.url} is not empty: checkpoints are never overwritten. Take another URL")
    if target.format == HUGGING_FACE and (found := fnmatch.filter(names, WEIGHTS)):
        raise CheckpointError(f"{target.url} has weights already: {found[0]}. Remove them, or take another directory")
    _check_surroundings(url, open_storage)


def _check_surroundings(url: str, open_storage: Callable[[str], Storage]) -> None:
    """Raises ``CheckpointError`` if ``url`` is inside of a checkpoint, or has a name that a run takes for a step."""
    try:
        folder, name = folder_and_name(url.rstrip("/"))
        above = open_storage(folder)
        names = above.list()
    except (ValueError, OSError):  # a bucket has nothing above it, and who may write to a folder may not list above it
        return
    if {MANIFEST, STOCK} & names.keys():
        raise CheckpointError(f"{above.url} is a checkpoint, which nothing may be added to. Take another URL")
    if directories_of([f"{name}/{MANIFEST}"]):
        raise CheckpointError(f"{name} is a name of the steps that a Checkpointer saves. Take another name")


def write(target: Target, mean: MeanSource, last: WeightSource) -> int:
    """Writes the merged weights, and returns the bytes of all files.

    Args:
        last: the last source, of which a checkpoint takes what is no weight.

    Raises:
        CheckpointError: a source is damaged, or the target could not be written. No file is there that is not whole,
            and no checkpoint.
    """
    if target.format == CHECKPOINT:
        return _write_checkpoint(target, mean, last)
    if target.format == HUGGING_FACE:
        files = split_into_files(mean.tensors, MAX_SHARD_BYTES)
        return write_directory(target.storage, files, last.configs, mean, safetensors_file)
    return target.storage.write(target.name, FORMATS[target.format](mean, mean.tensors))


@dataclass(frozen=True, slots=True)
class _MergedBlock:
    """A block of a tensor whose elements are made while it is written. Blocks must be written in their order."""

    key: str
    box: Box
    dtype: torch.dtype
    is_whole: bool
    parts: Iterator[tuple[int, memoryview]]  # of all blocks in their order

    def pieces(self) -> Iterator[memoryview]:
        """Yields the bytes of the elements in row-major order."""
        left = payload_bytes(self.dtype, self.box.sizes)
        while left > 0:
            _, data = next(self.parts)
            left -= len(data)
            yield data


def _write_checkpoint(target: Target, mean: MeanSource, last: WeightSource) -> int:
    """Writes and commits a checkpoint, as [Note: commit] in ``checkpoint/saving/commit.py`` describes it for one rank.

    Its step is that of the last source.
    """
    tensors = mean.tensors
    boxes = [
        (tensor, box) for tensor in tensors for box in cut(whole(tensor.shape), MAX_ITEM_BYTES // tensor.dtype.itemsize)
    ]
    with contextlib.closing(mean.boxes(boxes)) as parts:
        blocks = [
            _MergedBlock(last.places[tensor.name].key, box, tensor.dtype, box == whole(tensor.shape), parts)
            for tensor, box in boxes
        ]
        objects = {key: decode(value.encoded, key) for key, value in last.values.items()}
        result = write_blocks(target.storage, "", 0, blocks, objects, lambda: None)
    places = ((tensor, last.places[tensor.name]) for tensor in tensors)
    saved = {place.key: (SavedTensor(tensor.shape, tensor.dtype), place.path, place.rank) for tensor, place in places}
    commit(target.storage, "", CommitRecord(last.step or 0, saved, last.values), [result], lambda: None)
    return sum(target.storage.sizes().values())
