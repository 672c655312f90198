"""Directories that ``from_pretrained`` of Hugging Face's transformers reads.

Files of safetensors, with an index if there are several, and the model's configuration:
https://huggingface.co/docs/transformers/models#sharded-checkpoints.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn

from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.export.formats import Exported, safetensors_dtype
from dist_asgd.checkpoint.state.module_names import fqn_of, unwrapped
from dist_asgd.checkpoint.storage.storage import Storage

MAX_SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
WEIGHTS = "model*.safetensors*"  # what from_pretrained looks for
CONFIGS = {"config.json": "config", "generation_config.json": "generation_config"}  # with the model's attributes


@dataclass(frozen=True, slots=True)
class File:
    """One of the files of an export."""

    name: str
    tensors: Sequence[Exported]


@runtime_checkable
class Config(Protocol):
    """The configuration of a model of transformers."""

    def to_json_string(self) -> str: ...


def split(tensors: Sequence[Exported], most: int) -> list[File]:
    """The tensors in their order in files of at most ``most`` bytes of tensors each, or of one tensor.

    Raises:
        CheckpointError: for dtypes and names that safetensors does not have.
    """
    parts: list[list[Exported]] = [[]]
    size = 0
    for tensor in tensors:
        safetensors_dtype(tensor)
        if parts[-1] and size + tensor.nbytes > most:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.nbytes
    if len(parts) == 1:
        return [File("model.safetensors", parts[0])]
    return [File(f"model-{n:05}-of-{len(parts):05}.safetensors", part) for n, part in enumerate(parts, 1)]


def write_directory(
    storage: Storage, files: Sequence[File], configs: Mapping[str, bytes], write: Callable[[File], int]
) -> int:
    """Writes all, the index last; returns the bytes of all files. If anything fails, takes the weights away again.

    Args:
        configs: other files, by name.
        write: writes one of the ``files`` to the storage, and returns its bytes.

    Raises:
        CheckpointError: there are weights already.
    """
    check_free(storage)
    total = sum(storage.write(name, [data]) for name, data in configs.items())
    with _removed_on_failure(storage, files):
        total += sum(write(file) for file in files)
        if len(files) > 1:
            total += storage.write(INDEX, [index_of(files)])
    return total


def check_free(storage: Storage) -> None:
    """Raises ``CheckpointError`` where there are weights already: a mixture of both might be loaded."""
    found = fnmatch.filter(storage.list(), WEIGHTS)
    if found:
        raise CheckpointError(
            f"{storage.url} has weights already: {', '.join(sorted(found)[:3])}. Of several files some would be old "
            "and some new for a while: remove them first, or take another directory"
        )


@contextlib.contextmanager
def _removed_on_failure(storage: Storage, files: Sequence[File]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # what went wrong before is what has to be heard of
            for file in files:
                storage.remove(file.name)
        raise


def index_of(files: Sequence[File]) -> bytes:
    """Which tensor is in which file, as transformers writes it."""
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    size = sum(tensor.nbytes for file in files for tensor in file.tensors)
    content = {"metadata": {"total_size": size}, "weight_map": weight_map}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def configs_of(module: nn.Module, tensors: Sequence[Exported]) -> dict[str, bytes]:
    """The files beside the weights of a model of transformers, by name; none for others."""
    model = unwrapped(module)
    found = {name: getattr(model, attribute, None) for name, attribute in CONFIGS.items()}
    files = {name: config.to_json_string() for name, config in found.items() if isinstance(config, Config)}
    if "config.json" in files:  # as save_pretrained does: others pick the class by it
        config = json.loads(files["config.json"])
        config["architectures"] = [type(model).__name__.removeprefix("FSDP")]  # what fully_shard makes of the class
        floating = next((tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point), None)
        if floating is not None:
            config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(floating).removeprefix("torch.")
        files["config.json"] = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return {name: text.encode() for name, text in files.items()}


def name_to_keep(module: nn.Module, names: Sequence[str]) -> str:
    """Which of the names of a tensor is its only one in a file: the first that transformers does not leave out."""
    patterns = [
        (f"{fqn_of(module, prefix)}.".lstrip("."), pattern)
        for prefix, child in module.named_modules()
        for pattern in getattr(child, "_tied_weights_keys", None) or ()
    ]

    def is_left_out(name: str) -> bool:
        return any(name.startswith(above) and re.search(pattern, name[len(above) :]) for above, pattern in patterns)

    return next((name for name in names if not is_left_out(name)), names[0])
