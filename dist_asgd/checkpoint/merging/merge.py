"""Implements `merge`, which writes the weighted mean of the weights in several sources as a new checkpoint or file."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch.distributed as dist

from dist_asgd.checkpoint.errors import CheckpointError, naming, only_checkpoint_errors, together
from dist_asgd.checkpoint.merging.fit import check_fit
from dist_asgd.checkpoint.merging.mean import MeanSource, bytes_to_read
from dist_asgd.checkpoint.merging.power_averages import (
    Profile,
    check_width,
    combine,
    gamma_of_width,
    power_averages,
)
from dist_asgd.checkpoint.merging.sources import (
    Checkpoint,
    WeightSource,
    checkpoint_source,
    find_checkpoints,
    safetensors_source,
)
from dist_asgd.checkpoint.merging.steps import parse_steps
from dist_asgd.checkpoint.merging.target import CHECKPOINT, TARGETS, Target, check_absent, open_target, write
from dist_asgd.checkpoint.merging.weights import DECAYS, check_distances, check_weights, decay_weights
from dist_asgd.checkpoint.progress import Progress
from dist_asgd.checkpoint.saving.rendezvous import Rendezvous
from dist_asgd.checkpoint.storage.connection import FileSystems
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.checkpoint.storage.url import LOCAL, protocol_of
from dist_asgd.comm.consensus import Agreement
from dist_asgd.comm.process_groups import default_group

logger = logging.getLogger(__name__)

LARGEST_ERROR = 0.1  # of the profile of a power average, from which on a merge warns

ReportProgress = Callable[[int, int], None]  # bytes read since the last call, bytes in all


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge has written, and out of what."""

    url: str  # without credentials
    format: str  # "checkpoint", "huggingface", "safetensors" or "torch"
    step: int | None  # of the last source, where it has one
    tensors: int
    bytes: int  # of all files
    weights: Mapping[str, float]  # by source; they add up to 1
    from_last: Sequence[str]  # tensors that are the last source's: no floating point numbers, or without an average
    differing: Sequence[str]  # those of them that other sources have different, as far as these were compared
    own: Sequence[str]  # where averages were merged: tensors without one, whose own values were merged instead
    left_out: Sequence[str]  # values of the last source's entry, no tensors, that the target does not have
    profile_error: float | None  # of a power average of another width: how well it was met, relative, 0 if exactly


@dataclass(frozen=True, slots=True)
class MergeJob:
    """The checked arguments of ``merge``."""

    sources: Sequence[str]
    url: str
    options: Mapping[str, Any] | None
    steps: Sequence[int | range | slice] | None
    weights: Sequence[float] | None
    decay: str | None
    ema_width: float | None
    average: bool | str
    entry: str
    format: str | None
    file_systems: list[FileSystems] = field(default_factory=list)  # of the stores of sources and target

    def open_storage(self, url: str) -> Storage:
        """Returns the files below ``url``, with the job's options if it is on the kind of store that they are for."""
        kinds = [protocol_of(known) for known in (*self.sources, self.url)]
        meant = next((kind for kind in kinds if kind != LOCAL), LOCAL)
        options = self.options if protocol_of(url) == meant else None
        return Storage.open(url, options, known=self.file_systems)


@only_checkpoint_errors()
def merge(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    url: str | os.PathLike[str],
    storage_options: Mapping[str, Any] | None = None,
    *,
    steps: str | Iterable[int] | None = None,
    weights: Sequence[float] | None = None,
    decay: str | None = None,
    ema_width: float | None = None,
    average: bool | str = False,
    entry: str = "model",
    format: str | None = None,
) -> MergeReport:
    """Writes the weighted mean of the weights in several sources as a new checkpoint or file.

    Works without a process group. Where there is one, it is collective: rank 0 merges, the others wait for it.

    The mean is computed in float64, or complex128, and rounded once to the dtype of the weights, part by part: memory
    does not grow with the model. Names, shapes and dtypes must be equal in all sources. Tensors of integers and bools
    are the last source's; the report names those that differ. Everything outside of ``entry`` is left out: optimizers,
    schedulers, random states. What is no tensor in ``entry`` is the last source's where both it and the target are
    checkpoints of this library, and is left out elsewhere. Checksums of sources are verified as they are read; files of
    safetensors have none.

    Args:
        sources: one or several URLs or paths: of a checkpoint (of this library or of torch.distributed.checkpoint), of
            a run, whose newest checkpoint is taken unless ``steps`` says which, of a file of safetensors, or of a
            directory in the layout of Hugging Face. In the order of training where ``decay`` is given.
        url: where to write; nothing may be there yet. Without ``format``, a suffix means a file (``.safetensors``;
            ``.pt``, ``.pth``, ``.bin`` for ``torch.load``), a slash at the end a directory in the layout of Hugging
            Face, and anything else a checkpoint, which ``load`` and torch's ``dcp.load`` read.
        storage_options: options of fsspec for the kind of store of the first source that is no local path, or of the
            target if all are; sources and target on other kinds take theirs from the environment.
        steps: of the runs in ``sources``: whole numbers, or a text: ``"1000:2000:100"`` takes 1000, 1100, ..., 2000,
            which all must exist; ``"1000:2000"`` takes those that exist; parts may be joined by commas.
        weights: one for each checkpoint, in order; divided by their sum. None: all are equal.
        decay: ``"linear"``, ``"cosine"`` or ``"1-sqrt"``: weights by which checkpoints of a training at a constant
            learning rate stand for its decay over their steps. Linear is the uniform mean.
        ema_width: makes the power average (``PolynomialDecay``) of this width at the newest of the checkpoints, out of
            the power averages that ``ShardedASGD`` or ``ShardedAverages`` has in all of them. The width is the standard
            deviation of the weights of iterates, as a share of the training so far. Tensors without an average are the
            last source's.
        average: True: merge optimizers' averages in place of the weights. A name: of several averages, the one of this
            name.
        entry: of the saved state, whose tensors are merged; "" for all tensors. Names lose it.
        format: ``"checkpoint"``, ``"huggingface"``, ``"safetensors"`` or ``"torch"``; None: by ``url``.

    Returns:
        What was written, with the weight of each source, on every rank.

    Raises:
        CheckpointError: on every rank: sources do not exist, do not fit together or are damaged, or the target exists
            or could not be written. No checkpoint and no incomplete file is left.
        ValueError, TypeError: an argument is invalid on some rank. Every rank raises it.
    """
    require_one_writer()
    agreement = Agreement(default_group(None), "dist_asgd.merge()")
    with together(agreement, "merge()"):
        job = checked_job(
            sources,
            url,
            storage_options,
            steps=steps,
            weights=weights,
            decay=decay,
            ema_width=ema_width,
            average=average,
            entry=entry,
            format=format,
        )
    name = f"merge/{secrets.token_hex(8)}" if agreement.rank == 0 else ""
    with Rendezvous(agreement, agreement.gather(name)[0]) as rendezvous:
        if agreement.rank:
            return MergeReport(**json.loads(rendezvous.wait_for_outcome()))
        report = run_merge(job)
        rendezvous.announce(json.dumps(asdict(report)))
    return report


def require_one_writer() -> None:
    """Raises ``CheckpointError`` where torchrun started several processes without a process group: all would write."""
    count = os.environ.get("WORLD_SIZE", "1")
    if dist.is_torchelastic_launched() and count != "1" and not dist.is_initialized():
        raise CheckpointError(
            f"torchrun started {count} processes, and each would merge: call torch.distributed.init_process_group() "
            "first, or merge in one process"
        )


def checked_job(
    sources: Any,
    url: Any,
    storage_options: Mapping[str, Any] | None,
    *,
    steps: Any,
    weights: Any,
    decay: Any,
    ema_width: Any,
    average: Any,
    entry: Any,
    format: Any,
) -> MergeJob:
    """Returns the arguments of ``merge``, checked as far as they can be without a request.

    Raises:
        ValueError, TypeError: an argument is invalid.
    """
    given = [
        name for name, value in (("weights", weights), ("decay", decay), ("ema_width", ema_width)) if value is not None
    ]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other: each of them says the weights")
    if ema_width is not None and average is not False:
        raise ValueError("ema_width takes all power averages that there are: leave out average")
    for name, value, known in (("decay", decay, tuple(DECAYS)), ("format", format, TARGETS)):
        if value is not None and value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, or None, got {value!r}")
    if not isinstance(average, bool | str) or not isinstance(entry, str):
        raise TypeError(f"average must be a bool or a name, and entry a name, got {average!r} and {entry!r}")
    return MergeJob(
        [_url(one) for one in ([sources] if isinstance(sources, str | os.PathLike) else sources)],
        _url(url),
        storage_options,
        None if steps is None else parse_steps(steps),
        None if weights is None else check_weights(weights),
        decay,
        None if ema_width is None else check_width(ema_width),
        average,
        entry,
        format,
    )


def _url(url: Any) -> str:
    text = os.fspath(url) if isinstance(url, str | os.PathLike) else url
    if not isinstance(text, str) or not text:
        raise TypeError(f"expected a URL or a path, got {url!r}: merge(sources, url) writes to url")
    return text


def run_merge(job: MergeJob, report: ReportProgress | None = None) -> MergeReport:
    """Merges in this process.

    Args:
        report: called with the progress; None to log it.

    Raises:
        CheckpointError, ValueError: as ``merge``, which see.
        OSError: a storage failed.
    """
    target = open_target(job.url, job.open_storage, job.format)
    check_absent(target, job.url, job.open_storage)
    found = [place for url in job.sources for place in find_checkpoints(url, job.open_storage, job.steps)]
    if not found:
        raise ValueError("there is nothing to merge: sources is empty")
    error = None
    if job.ema_width is None:
        sources = [_open(place, job) for place in found]
        weights = _weights(job, sources)
    else:
        sources, weights, error = _posthoc(job, found, job.ema_width)
    _check_once(sources)
    check_fit(sources)
    from_last = sources[-1].own if job.ema_width is not None else frozenset[str]()
    total = bytes_to_read(sources, from_last)
    progress = Progress(f"merging into {target.url}", total, 0)
    mean = MeanSource(sources, weights, from_last, progress.add if report is None else lambda n: report(n, total))
    size = write(target, mean, sources[-1])
    return _report(target, size, mean, dict(zip((s.name for s in sources), weights, strict=True)), error)


def _open(place: Checkpoint, job: MergeJob) -> WeightSource:
    if place.files is None:
        return checkpoint_source(place.open(), job.entry, job.average)
    if job.average is not False:
        raise CheckpointError(f"{place.url} has no averages: files of safetensors have weights only")
    return safetensors_source(place, job.entry)


def _weights(job: MergeJob, sources: Sequence[WeightSource]) -> list[float]:
    if job.decay is not None:
        check_distances([source.step for source in sources])
        return decay_weights(job.decay, len(sources))
    if job.weights is None:
        return [1.0] * len(sources)
    if len(job.weights) != len(sources):
        names = ", ".join(source.url for source in sources[:5])
        raise ValueError(f"{len(job.weights)} weights are given for {len(sources)} checkpoints: {names}")
    return list(job.weights)


def _posthoc(job: MergeJob, found: Sequence[Checkpoint], width: float) -> tuple[list[WeightSource], list[float], float]:
    """Returns the power averages of all checkpoints, their weights, and the error of the combined profile."""
    averages: list[tuple[Profile, WeightSource]] = []
    for place in found:
        if place.files is not None:
            raise CheckpointError(f"{place.url} has no averages: files of safetensors have weights only")
        opened = place.open()
        with naming(place.url):
            profiles = power_averages(opened)
        averages += [(profile, checkpoint_source(opened, job.entry, name)) for name, profile in profiles.items()]
    averages.sort(key=lambda pair: pair[0].count)  # the newest is the last
    profiles_of_all = [profile for profile, _ in averages]
    _check_profiles(profiles_of_all, found[0].url)
    newest = Profile(gamma_of_width(width), profiles_of_all[-1].count)
    weights, error = combine(profiles_of_all, newest)
    if error > LARGEST_ERROR:
        logger.warning(
            "the power averages that are stored make up one of width %s with an error of %.0f %%: merge more "
            "checkpoints, or take a width nearer to the stored ones",
            width,
            100 * error,
        )
    return [source for _, source in averages], weights, error


def _check_profiles(profiles: Sequence[Profile], url: str) -> None:
    if len(profiles) < 2:
        raise CheckpointError(
            f"{url} has one power average, of which no other can be made: two, or several checkpoints, are needed"
        )
    if len(distances := sorted({profile.every for profile in profiles})) > 1:
        raise CheckpointError(
            f"the power averages take iterates at different distances, every={distances}, and cannot be combined: "
            "merge checkpoints whose power averages have one every="
        )


def _check_once(sources: Sequence[WeightSource]) -> None:
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise CheckpointError(f"{twice[0]} is given twice: use weights to count it more")


def _report(
    target: Target, size: int, mean: MeanSource, weights: Mapping[str, float], error: float | None
) -> MergeReport:
    last, total = mean.sources[-1], sum(weights.values())
    from_last = [tensor.name for tensor in mean.tensors if not mean.is_mean(tensor)]
    uncounted = [name for name in sorted(mean.differing) if last.tensors[name].saved.shape]
    if uncounted:
        logger.warning(
            "tensors of integers that differ are the last source's, since integers have no mean: %s. If they are "
            "quantized weights, merge those from before the quantization",
            ", ".join(uncounted[:10]),
        )
    kept = target.format == CHECKPOINT
    return MergeReport(
        url=target.url,
        format=target.format,
        step=last.step,
        tensors=len(mean.tensors),
        bytes=size,
        weights={name: weight / total for name, weight in weights.items()},
        from_last=from_last,
        differing=sorted(mean.differing),
        own=sorted(last.own - set(from_last)),
        left_out=sorted([*last.left_out, *(() if kept else last.values)]),
        profile_error=error,
    )
