"""The steps of one load: matching with live state, reading and verifying, and the change of live state."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dist_asgd.checkpoint.errors import CheckpointError, naming, together
from dist_asgd.checkpoint.loading.sources import CheckpointSource
from dist_asgd.checkpoint.progress import Progress
from dist_asgd.checkpoint.state.contents import Destination, destination_of
from dist_asgd.checkpoint.state.mismatches import Problems, listed
from dist_asgd.checkpoint.state.tree import key_of
from dist_asgd.comm.consensus import Agreement

logger = logging.getLogger(__name__)


class _Findings(NamedTuple):
    """What one rank has found while it planned a load. All dicts are by key."""

    problems: Problems
    owners: dict[str, tuple[int, Sequence[int]]]  # the rank whose own entries are taken, all ranks that have some
    skipped: Mapping[str, str]
    casts: Mapping[str, str]


def load_checkpoint(
    agreement: Agreement,
    source: CheckpointSource,
    state: Mapping[str, Any],
    *,
    strict: bool,
    average: bool | str,
    cast: bool,
    prefix: str,
) -> None:
    """Fills ``state`` from a checkpoint. Collective; on every rank, ``source`` must be the same checkpoint.

    Args:
        state, strict, average, cast, prefix: as for ``Checkpointer.load``.

    Raises:
        CheckpointError: on every rank. With nothing changed: the checkpoint does not fit ``state``, or bytes that are
            needed are damaged. With a part of ``state`` loaded: a ``load_state_dict`` raised.
    """
    with together(agreement, "load()"), naming(source.url):
        destination = destination_of(
            state,
            source.tensors,
            source.values,
            source.paths,
            source.owners,
            viewers=source.viewers,
            strict=strict,
            average=average,
            cast=cast,
            prefix=_with_dot(prefix),
            stock=source.is_stock,
        )
    problems = _problems_of_all(agreement, source, destination, strict)
    if problems:
        raise CheckpointError(f"{source.url} does not fit what it is loaded into\n{problems.message()}")
    wanted = [(key, entry) for key, entries in destination.tensors.items() for entry in entries]
    own, shared = source.plan_reads(agreement, wanted)
    size = own.size + (shared.size if shared else 0)
    with own, shared or contextlib.nullcontext():
        progress = Progress(f"reading and verifying {source.url}", size, agreement.rank)
        with together(agreement, "load()"), naming(source.url):
            own.read(progress)
        if shared:
            with naming(source.url):
                shared.read(agreement, progress)
        with together(agreement, "load()"), naming(source.url):
            # All ranks have verified what they read: from here on, live tensors change.
            progress = Progress(f"loading {source.url}", size, agreement.rank)
            own.apply(progress)
            if shared:
                shared.apply(progress)
    with together(agreement, "load()"), _told_as_partly_loaded(source.url):
        destination.finish()


def _with_dot(prefix: str) -> str:
    """Returns a prefix of names with a dot at its end, or an empty one. Raises ``TypeError`` for what is no string."""
    if not isinstance(prefix, str):
        raise TypeError(f"prefix must be a string, such as 'model.', got {prefix!r}")
    return f"{prefix.rstrip('.')}." if prefix else ""


def _problems_of_all(
    agreement: Agreement, source: CheckpointSource, destination: Destination, strict: bool
) -> Problems:
    """Returns the mismatches of all ranks together. Collective.

    An entry is expected where any rank takes it. What ranks have saved of their own must be taken by one rank each.
    """
    viewers = {key_of(path): rank for path, rank in source.viewers.items()}
    owners = {key: (viewers.get(key, agreement.rank), ranks) for key, ranks in destination.owners.items()}
    problems, taken = Problems(), dict[str, set[int]]()
    everyone = agreement.gather(_Findings(destination.problems, owners, destination.skipped, destination.casts))
    for findings in everyone:
        problems = problems.merge(findings.problems)
        for key, (rank, _) in findings.owners.items():
            taken.setdefault(key, set()).add(rank)
    if unexpected := list(problems.unexpected):
        used = agreement.union([key in destination.used for key in unexpected])
        for key in (key for key, is_used in zip(unexpected, used, strict=True) if is_used):
            del problems.unexpected[key]
    for key, ranks in taken.items() if strict else ():
        left = sorted({owner for one in everyone if key in one.owners for owner in one.owners[key][1]} - ranks)
        if left:
            problems.unexpected[key] = (
                f"ranks {left} have saved their own, and no rank takes it: load it on as many ranks, in process groups "
                "like those at the save, or pass strict=False"
            )
    if not problems and agreement.rank == 0:
        _log(source.url, everyone)
    return problems


def _log(url: str, everyone: Sequence[_Findings]) -> None:
    """Logs what a load that is not strict skips, and how many tensors a load that casts converts."""
    skipped = {key: text for findings in everyone for key, text in findings.skipped.items()}
    casts = {key: text for findings in everyone for key, text in findings.casts.items()}
    if skipped:
        logger.warning("%s: not loaded, of another shape (%d):\n%s", url, len(skipped), listed(skipped))
    if casts:
        key = min(casts)
        logger.info("%s: %d tensors are cast, such as %s from %s", url, len(casts), key, casts[key])


@contextlib.contextmanager
def _told_as_partly_loaded(url: str) -> Iterator[None]:
    """Raises errors of the block as ``CheckpointError`` that says that a part of the state is loaded."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"{url} is whole, but what was saved there is not accepted: {type(error).__name__}: {error}. The state is "
            "loaded in part now"
        ) from error
