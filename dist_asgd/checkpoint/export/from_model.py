"""Implements `export`, which writes the weights of a live model to files that need only torch or safetensors."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dist_asgd.checkpoint.errors import only_checkpoint_errors, together
from dist_asgd.checkpoint.export.formats import FORMATS, Exported, format_by, safetensors_dtype
from dist_asgd.checkpoint.export.gather import FailedOnAllRanks, GatherSource, OwnedBoxes, owned_boxes
from dist_asgd.checkpoint.export.huggingface import (
    MAX_SHARD_BYTES,
    Files,
    config_files,
    name_to_keep,
    split_into_files,
    write_directory,
)
from dist_asgd.checkpoint.format.entries import TensorEntry
from dist_asgd.checkpoint.saving.assign import Offer
from dist_asgd.checkpoint.state.module_names import tied_names
from dist_asgd.checkpoint.state.modules import module_state
from dist_asgd.checkpoint.state.tensor_blocks import to_save
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.checkpoint.storage.url import folder_and_name
from dist_asgd.comm.consensus import Agreement
from dist_asgd.comm.process_groups import default_group


@dataclass(frozen=True, slots=True)
class _ModelContribution:
    """Description of the tensors that one rank has, which it sends to rank 0."""

    offers: dict[str, Offer]  # by name of the tensor
    ties: list[list[str]]  # the names of each tied weight; the first is the name to keep where only one is possible


@dataclass(frozen=True, slots=True)
class _ExportPlan:
    """Work of one rank in an export. All ranks have equal ``format`` and ``files``."""

    format: str  # a key of FORMATS, or "huggingface"
    files: Files
    owned: Sequence[OwnedBoxes]  # on rank 0: for each rank; on other ranks: for this rank only


@only_checkpoint_errors()
def export(
    url: str | os.PathLike[str],
    model: nn.Module,
    storage_options: Mapping[str, Any] | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes the weights of ``model`` to files that other programs read without this library. Collective.

    Inside of ``with opt.averaged_parameters():`` the weights are the averages. The files have parameters and persistent
    buffers in their own dtypes, by the names of ``model.state_dict()`` without the names of wrappers
    (DistributedDataParallel, ``torch.compile``, FSDP1). Rank 0 writes the files. It gathers the blocks of other ranks
    in parts of at most 16 MiB, so the memory that an export takes does not grow with the model or its largest tensor.
    Where several ranks have a block, such as of a buffer, the block of the lowest rank is written. Warns about entries
    of the state that are no tensors, and leaves them out.

    Args:
        url: a local path or the URL of any fsspec protocol. Rank 0's counts. It names
            - a file that ends in ``.safetensors``;
            - a file that ends in ``.pt``, ``.pth`` or ``.bin``, which ``torch.load(weights_only=True)`` reads;
            - or else a directory in the layout of Hugging Face: ``model.safetensors``, or numbered files and
              ``model.safetensors.index.json``. For a model of transformers also ``config.json`` is written, so that
              ``from_pretrained`` reads the directory.
            An existing file is replaced. A directory must not have weights in the layout of Hugging Face yet.
        model: a plain model, or one that is placed and wrapped in any way that `ShardedASGD` takes. ``.pt`` has a tied
            weight under all its names, safetensors under the one name that transformers expects.
        storage_options: options of fsspec for the protocol of ``url``. Rank 0's count.
        max_shard_bytes: maximum bytes of tensors in one file of a directory. A larger tensor has its own file.

    Raises:
        CheckpointError: the files could not be written. Every rank raises it. No incomplete file is left.
        ValueError, TypeError: a bad argument on some rank. Every rank raises it.
    """
    agreement = Agreement(default_group(None), "dist_asgd.export()")
    with together(agreement, "export()"):
        _check(model, max_shard_bytes)
        entries, contribution = _contribution(model)
    by_rank = [item for item, _ in agreement.collect(contribution, [])]
    configs: dict[str, bytes] = {}
    storage, plans = None, []
    with together(agreement, "export()"):
        if agreement.rank == 0:
            kind = format_by(os.fspath(url))
            storage, name = _target(url, storage_options, kind)
            tensors = _all_tensors(by_rank)
            plans = _plan(by_rank, tensors, kind, name, max_shard_bytes)
            configs = config_files(model, tensors)
    plan: _ExportPlan = agreement.scatter(plans)
    _write_or_send(agreement, plan, GatherSource(agreement, entries, plan.owned), storage, configs)


def _check(model: object, max_shard_bytes: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(max_shard_bytes, int) or isinstance(max_shard_bytes, bool) or max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be a whole number of at least 1, got {max_shard_bytes!r}")


def _contribution(model: nn.Module) -> tuple[dict[str, TensorEntry], _ModelContribution]:
    """Returns this rank's tensors in live memory by name, and their description for rank 0."""
    state = module_state(model)
    entries = {name: to_save(name, value) for name, value in state.items() if isinstance(value, Tensor)}
    if left_out := sorted(state.keys() - entries.keys()):
        warnings.warn(f"left out of the export, as they are no tensors: {', '.join(left_out)}", stacklevel=4)
    offers = {
        name: Offer(entry.shape, entry.dtype, tuple(block.box for block in entry.blocks))
        for name, entry in entries.items()
    }
    ties = []
    for names in tied_names(model):
        if known := [name for name in names if name in entries]:
            kept = name_to_keep(model, known)
            ties.append([kept, *(name for name in known if name != kept)])
    return entries, _ModelContribution(offers, ties)


def _all_tensors(by_rank: Sequence[_ModelContribution]) -> list[Exported]:
    """Returns the tensors of all ranks, in the order of ranks and of their states; a tied weight once."""
    found: dict[str, Exported] = {}
    for contribution in by_rank:
        others = {name: kept for kept, *names in contribution.ties for name in names}
        ties = {kept: tuple(names) for kept, *names in contribution.ties}
        for name, offer in contribution.offers.items():
            if name not in others:
                found.setdefault(name, Exported(name, name, offer.shape, offer.dtype, ties.get(name, ())))
    return list(found.values())


def _target(url: str | os.PathLike[str], options: Mapping[str, Any] | None, kind: str | None) -> tuple[Storage, str]:
    """Returns the directory to write to, and the name of the file in it, which is "" for a whole directory."""
    if kind is not None:
        folder, name = folder_and_name(os.fspath(url))
        return Storage.open(folder, options), name
    return Storage.open(url, options), ""


def _plan(
    by_rank: Sequence[_ModelContribution], tensors: Sequence[Exported], kind: str | None, name: str, max_bytes: int
) -> list[_ExportPlan]:
    """Returns the work of each rank."""
    files = split_into_files(tensors, max_bytes) if kind is None else {name: tensors}
    for tensor in tensors if kind == "safetensors" else ():
        safetensors_dtype(tensor)  # raises for a dtype that the format lacks before anything is gathered
    owned = owned_boxes([contribution.offers for contribution in by_rank])
    shares = [owned, *([share] for share in owned[1:])]
    return [_ExportPlan(kind or "huggingface", files, share) for share in shares]


def _write_or_send(
    agreement: Agreement, plan: _ExportPlan, source: GatherSource, storage: Storage | None, configs: Mapping[str, bytes]
) -> None:
    """Writes the files on rank 0 and sends blocks to it on all other ranks. Raises on all ranks what fails on one."""
    file_of = FORMATS.get(plan.format, FORMATS["safetensors"])
    failure: BaseException | None = None
    try:
        if storage is None:
            for tensors in plan.files.values():
                for _ in file_of(source, tensors):
                    pass
        elif plan.format == "huggingface":
            write_directory(storage, plan.files, configs, source, file_of)
        else:
            ((name, tensors),) = plan.files.items()
            storage.write(name, file_of(source, tensors))
    except FailedOnAllRanks as failed:
        raise failed.error from failed.error.__cause__
    except BaseException as error:
        failure = error
    with together(agreement, "export()"):
        if failure is not None:
            raise failure
