"""Writes directories that ``from_pretrained`` of Hugging Face's transformers reads.

Such a directory has one or several files of safetensors, an index if there are several, and the configuration of the
model: https://huggingface.co/docs/transformers/models#sharded-checkpoints.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

from torch import nn

from dist_asgd.boxes import grouped
from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.export.formats import Exported, FileFormat, PayloadSource, safetensors_dtype
from dist_asgd.checkpoint.format.entries import dtype_name
from dist_asgd.checkpoint.state.module_names import fqn_of, unwrapped
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.checkpoint.storage.waiting import tidying_up

MAX_SHARD_BYTES = 5 * 10**9  # default for the bytes of tensors in one file
INDEX = "model.safetensors.index.json"
WEIGHTS = "model*.safetensors*"  # pattern of the names of files that from_pretrained may load
Files: TypeAlias = Mapping[str, Sequence[Exported]]  # the tensors of each file of an export by its name
CONFIGS = {"config.json": "config", "generation_config.json": "generation_config"}  # attributes of the model


@runtime_checkable
class Config(Protocol):
    """Configuration of a model, such as PretrainedConfig and GenerationConfig of transformers."""

    def to_json_string(self) -> str: ...


def split_into_files(tensors: Sequence[Exported], max_bytes: int) -> Files:
    """Distributes tensors in their order over files, named as transformers names them. Returns the tensors by file.

    A file has at most ``max_bytes`` bytes of tensors, or one tensor that is larger.

    Raises:
        CheckpointError: safetensors cannot hold the dtype or the name of a tensor.
    """
    for tensor in tensors:
        safetensors_dtype(tensor)  # raises for a dtype or name that the format lacks
    parts = list(grouped(((tensor, tensor.nbytes) for tensor in tensors), max_bytes))
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{n:05}-of-{len(parts):05}.safetensors": part for n, part in enumerate(parts, 1)}


def write_directory(
    storage: Storage, files: Files, configs: Mapping[str, bytes], source: PayloadSource, file_of: FileFormat
) -> int:
    """Writes configurations, weights and, last, the index. Returns the number of bytes of all files.

    Removes the files of weights again if anything fails.

    Args:
        storage: the directory.
        files: the tensors of each file of weights by its name.
        configs: contents of further files by name.
        source: has the elements of the tensors.
        file_of: yields the bytes of a file of weights.

    Raises:
        CheckpointError: the directory has weights already, or a file could not be written.
    """
    _check_no_weights(storage)
    total = sum(storage.write(name, [data]) for name, data in configs.items())
    try:
        for name, tensors in files.items():
            total += storage.write(name, file_of(source, tensors))
        if len(files) > 1:
            total += storage.write(INDEX, [_index_json(files)])
    except BaseException:
        with tidying_up():  # an error of the removal must not hide the first error
            for name in files:
                storage.remove(name)
        raise
    return total


def _check_no_weights(storage: Storage) -> None:
    """Raises CheckpointError if the directory has weights already, as a mixture of old and new might be loaded."""
    found = fnmatch.filter(storage.list(), WEIGHTS)
    if found:
        raise CheckpointError(
            f"{storage.url} has weights already: {', '.join(sorted(found)[:3])}. Of several files some would be old "
            "and some new for a while: remove them first, or take another directory"
        )


def _index_json(files: Files) -> bytes:
    """Returns the contents of model.safetensors.index.json, which tells the file of each tensor."""
    weight_map = {tensor.name: name for name, tensors in files.items() for tensor in tensors}
    size = sum(tensor.nbytes for tensors in files.values() for tensor in tensors)
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
