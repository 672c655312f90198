"""The steps of one load: matching with live state, reading and verifying, and the change of live state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from dist_asgd.checkpoint.errors import CheckpointError, naming, together
from dist_asgd.checkpoint.loading.sources import CheckpointSource
from dist_asgd.checkpoint.progress import Progress
from dist_asgd.checkpoint.state.contents import Destination, destination_of
from dist_asgd.checkpoint.state.mismatches import Problems
from dist_asgd.checkpoint.state.tree import key_of
from dist_asgd.comm.consensus import Agreement


def load_checkpoint(
    agreement: Agreement, source: CheckpointSource, state: Mapping[str, Any], *, strict: bool, average: bool | str
) -> None:
    """Fills ``state`` from a checkpoint. Collective; on every rank, ``source`` must be the same checkpoint.

    Args:
        state, strict, average: as for ``Checkpointer.load``.

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


def _problems_of_all(
    agreement: Agreement, source: CheckpointSource, destination: Destination, strict: bool
) -> Problems:
    """Returns the mismatches of all ranks together. Collective.

    An entry is expected where any rank takes it. What ranks have saved of their own must be taken by one rank each.
    """
    viewers = {key_of(path): rank for path, rank in source.viewers.items()}
    owners = {key: (viewers.get(key, agreement.rank), ranks) for key, ranks in destination.owners.items()}
    problems, taken = Problems(), dict[str, set[int]]()
    everyone = agreement.gather((destination.problems, owners))
    for found, taken_by_rank in everyone:
        problems = problems.merge(found)
        for key, (rank, _) in taken_by_rank.items():
            taken.setdefault(key, set()).add(rank)
    if unexpected := list(problems.unexpected):
        used = agreement.union([key in destination.used for key in unexpected])
        for key in (key for key, is_used in zip(unexpected, used, strict=True) if is_used):
            del problems.unexpected[key]
    for key, ranks in taken.items() if strict else ():
        left = sorted({owner for _, own in everyone if key in own for owner in own[key][1]} - ranks)
        if left:
            problems.unexpected[key] = (
                f"ranks {left} have saved their own, and no rank takes it: load it on as many ranks, in process groups "
                "like those at the save, or pass strict=False"
            )
    return problems


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
