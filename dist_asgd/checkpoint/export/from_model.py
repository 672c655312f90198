"""``export``: the weights of a live model, or their averages, as files that need no more than torch or safetensors."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dist_asgd.checkpoint.errors import only_checkpoint_errors, together
from dist_asgd.checkpoint.export.formats import FORMATS, Exported, format_by, safetensors_dtype
from dist_asgd.checkpoint.export.gather import AllFailed, Gathering, Owned, owned_by
from dist_asgd.checkpoint.export.huggingface import (
    MAX_SHARD_BYTES,
    File,
    configs_of,
    name_to_keep,
    split,
    write_directory,
)
from dist_asgd.checkpoint.format.entries import TensorEntry
from dist_asgd.checkpoint.saving.assign import Offer
from dist_asgd.checkpoint.state.module_names import tied_names
from dist_asgd.checkpoint.state.modules import module_state
from dist_asgd.checkpoint.state.tensor_blocks import to_save
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.checkpoint.storage.url import folder_and_name
from dist_asgd.comm.consensus import Agreement, agreement_of_all
from dist_asgd.comm.objects import scatter_object


@dataclass(frozen=True, slots=True)
class _ModelContribution:
    """What each rank tells rank 0 of its model."""

    offers: dict[str, Offer]
    ties: list[list[str]]  # names of the same tensor; the first is the one to keep


@dataclass(frozen=True, slots=True)
class _ExportPlan:
    """What one rank has to do."""

    format: str
    files: Sequence[File]
    owned: Sequence[Owned]  # on rank 0 by rank; elsewhere this rank's only


@only_checkpoint_errors()
def export(
    url: str | os.PathLike[str],
    model: nn.Module,
    storage_options: Mapping[str, Any] | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes the weights of ``model`` for the use without this library. Collective.

    Inside ``with opt.averaged_parameters():`` they are the averages. Parameters and persistent buffers are written in
    their own dtypes, by the names of ``model.state_dict()`` without those of wrappers (DistributedDataParallel,
    ``torch.compile``, FSDP1). Rank 0 writes, and gathers what other ranks have in parts of some megabytes, so no rank
    ever has a whole copy, nor a whole tensor. Of what ranks have in common (buffers, say), rank 0's counts.

    Args:
        url: of rank 0, a local path or the URL of any fsspec protocol, to
            - a file that ends in ``.safetensors``, or in ``.pt``, ``.pth`` or ``.bin``, which
              ``torch.load(weights_only=True)`` reads; one of that name is replaced;
            - or else a directory, which gets the layout of Hugging Face: ``model.safetensors``, or numbered files and
              ``model.safetensors.index.json``, and ``config.json`` where the model is one of transformers, which then
              reads it by ``from_pretrained``. It must not have such weights yet.
        model: plain, or placed and wrapped in whatever way the optimizer takes it. A tensor with several names (tied
            weights) is in ``.pt`` under all of them; in safetensors under one, that which transformers expects.
        storage_options: fsspec's, for that protocol.
        max_shard_bytes: of tensors in one file of a directory; a larger tensor has a file for itself.

    Raises:
        CheckpointError: on every rank: it could not be written. Nothing that is not whole is there under its name.
        ValueError, TypeError: bad arguments; the same on every rank.
    """
    with agreement_of_all() as agreement:
        with together(agreement, "export()"):
            _check(model, max_shard_bytes)
            entries, brought = _contribution(model)
        everyone = [item for item, _ in agreement.collect(brought, [])]
        configs: dict[str, bytes] = {}
        storage, plans = None, []
        with together(agreement, "export()"):
            if agreement.rank == 0:
                kind = format_by(os.fspath(url))
                storage, name = _place(url, storage_options, kind)
                tensors = _tensors(everyone)
                plans = _plan(everyone, tensors, kind, name, max_shard_bytes)
                configs = configs_of(model, tensors)
        plan: _ExportPlan = scatter_object(plans, agreement.group)
        _carry_out(agreement, plan, Gathering(agreement, entries, plan.owned), storage, configs)


def _check(model: object, max_shard_bytes: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(max_shard_bytes, int) or isinstance(max_shard_bytes, bool) or max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be a whole number of at least 1, got {max_shard_bytes!r}")


def _contribution(model: nn.Module) -> tuple[dict[str, TensorEntry], _ModelContribution]:
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


def _tensors(everyone: Sequence[_ModelContribution]) -> list[Exported]:
    """All tensors, those that rank 0 knows first; tied ones once."""
    found: dict[str, Exported] = {}
    for brought in everyone:
        others = {name: kept for kept, *names in brought.ties for name in names}
        ties = {kept: tuple(names) for kept, *names in brought.ties}
        for name, offer in brought.offers.items():
            if name not in others:
                found.setdefault(name, Exported(name, name, offer.shape, offer.dtype, ties.get(name, ())))
    return list(found.values())


def _place(url: str | os.PathLike[str], options: Mapping[str, Any] | None, kind: str | None) -> tuple[Storage, str]:
    """Where to write: a directory, or for a file the one that it is in, and its name."""
    if kind is not None:
        folder, name = folder_and_name(os.fspath(url))
        return Storage.open(folder, options), name
    return Storage.open(url, options), ""


def _plan(
    everyone: Sequence[_ModelContribution], tensors: Sequence[Exported], kind: str | None, name: str, most: int
) -> list[_ExportPlan]:
    files = split(tensors, most) if kind is None else [File(name, tensors)]
    for tensor in tensors if kind == "safetensors" else ():
        safetensors_dtype(tensor)  # before anything is gathered
    owned = owned_by([brought.offers for brought in everyone])
    shares = [owned, *([share] for share in owned[1:])]
    return [_ExportPlan(kind or "huggingface", files, share) for share in shares]


def _carry_out(
    agreement: Agreement, plan: _ExportPlan, source: Gathering, storage: Storage | None, configs: Mapping[str, bytes]
) -> None:
    """Rank 0 writes, the others send; what fails on one rank is raised on all, as soon as they meet again."""
    file_of = FORMATS.get(plan.format, FORMATS["safetensors"])
    failure: Exception | None = None
    try:
        if storage is None:
            for file in plan.files:
                for _ in file_of(source, file.tensors):
                    pass
        elif plan.format == "huggingface":
            write_directory(
                storage, plan.files, configs, lambda file: storage.write(file.name, file_of(source, file.tensors))
            )
        else:
            storage.write(plan.files[0].name, file_of(source, plan.files[0].tensors))
    except AllFailed as failed:
        raise failed.error from failed.error.__cause__
    except Exception as error:
        failure = error
    with together(agreement, "export()"):
        if failure is not None:
            raise failure
