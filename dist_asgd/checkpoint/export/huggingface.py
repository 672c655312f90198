"""Writes directories that ``from_pretrained`` of Hugging Face's transformers reads.

Such a directory has one or several files of safetensors, an index if there are several, and the configuration of the
model: https://huggingface.co/docs/transformers/models#sharded-checkpoints.
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
from dist_asgd.checkpoint.format.entries import dtype_name
from dist_asgd.checkpoint.state.module_names import fqn_of, unwrapped
from dist_asgd.checkpoint.storage.storage import Storage

MAX_SHARD_BYTES = 5 * 10**9  # default for the bytes of tensors in one file
INDEX = "model.safetensors.index.json"
WEIGHTS = "model*.safetensors*"  # pattern of the names of files that from_pretrained may load
CONFIGS = {"config.json": "config", "generation_config.json": "generation_config"}  # attributes of the model


@dataclass(frozen=True, slots=True)
class ExportFile:
    """File of an export, and the tensors in it."""

    name: str
    tensors: Sequence[Exported]


@runtime_checkable
class Config(Protocol):
    """Configuration of a model, such as PretrainedConfig and GenerationConfig of transformers."""

    def to_json_string(self) -> str: ...


def split_into_files(tensors: Sequence[Exported], max_bytes: int) -> list[ExportFile]:
    """Distributes tensors in their order over files, named as transformers names them.

    A file has at most ``max_bytes`` bytes of tensors, or one tensor that is larger.

    Raises:
        CheckpointError: safetensors cannot hold the dtype or the name of a tensor.
    """
    parts: list[list[Exported]] = [[]]
    size = 0
    for tensor in tensors:
        safetensors_dtype(tensor)
        if parts[-1] and size + tensor.nbytes > max_bytes:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.nbytes
    if len(parts) == 1:
        return [ExportFile("model.safetensors", parts[0])]
    return [ExportFile(f"model-{n:05}-of-{len(parts):05}.safetensors", part) for n, part in enumerate(parts, 1)]


def write_directory(
    storage: Storage, files: Sequence[ExportFile], configs: Mapping[str, bytes], write: Callable[[ExportFile], int]
) -> int:
    """Writes configurations, weights and, last, the index. Returns the number of bytes of all files.

    Removes the files of weights again if anything fails.

    Args:
        storage: the directory.
        files: the files of weights.
        configs: contents of further files by name.
        write: writes one of the ``files`` to the storage and returns its number of bytes.

    Raises:
        CheckpointError: the directory has weights already, or a file could not be written.
    """
    check_no_weights(storage)
    total = sum(storage.write(name, [data]) for name, data in configs.items())
    with _removed_on_failure(storage, files):
        total += sum(write(file) for file in files)
        if len(files) > 1:
            total += storage.write(INDEX, [index_json(files)])
    return total


def check_no_weights(storage: Storage) -> None:
    """Raises CheckpointError if the directory has weights already, as a mixture of old and new might be loaded."""
    found = fnmatch.filter(storage.list(), WEIGHTS)
    if found:
        raise CheckpointError(
            f"{storage.url} has weights already: {', '.join(sorted(found)[:3])}. Of several files some would be old "
            "and some new for a while: remove them first, or take another directory"
        )


@contextlib.contextmanager
def _removed_on_failure(storage: Storage, files: Sequence[ExportFile]) -> Iterator[None]:
    """Removes ``files`` if the block raises."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # an error of the removal must not hide the first error
            for file in files:
                storage.remove(file.name)
        raise


def index_json(files: Sequence[ExportFile]) -> bytes:
    """Returns the contents of model.safetensors.index.json, which tells the file of each tensor."""
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    size = sum(tensor.nbytes for file in files for tensor in file.tensors)
    content = {"metadata": {"total_size": size}, "weight_map": weight_map}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def config_files(module: nn.Module, tensors: Sequence[Exported]) -> dict[str, bytes]:
    """Returns the configuration files of a model of transformers by name, or no files for any other model."""
    model = unwrapped(module)
    found = {name: getattr(model, attribute, None) for name, attribute in CONFIGS.items()}
    files = {name: config.to_json_string() for name, config in found.items() if isinstance(config, Config)}
    if "config.json" in files:  # save_pretrained adds both entries; readers choose the class of the model by the first
        config = json.loads(files["config.json"])
        config["architectures"] = [type(model).__name__.removeprefix("FSDP")]  # fully_shard renames the class
        floating = next((tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point), None)
        if floating is not None:
            config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype_name(floating)
        files["config.json"] = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return {name: text.encode() for name, text in files.items()}


def name_to_keep(module: nn.Module, names: Sequence[str]) -> str:
    """Returns the one of ``names``, all of a tied weight, that transformers expects in a file of safetensors.

    That is the first name that no ``_tied_weights_keys`` (regular expressions) of ``module`` and its children matches,
    or the first name if all match.
    """
    patterns = [
        (f"{fqn_of(module, prefix)}.".lstrip("."), pattern)
        for prefix, child in module.named_modules()
        for pattern in getattr(child, "_tied_weights_keys", None) or ()
    ]

    def is_left_out(name: str) -> bool:
        return any(name.startswith(above) and re.search(pattern, name[len(above) :]) for above, pattern in patterns)

    return next((name for name in names if not is_left_out(name)), names[0])
