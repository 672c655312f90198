"""One checkpoint on its way in: what fits, what is read, and the one moment when live state changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from dist_asgd.checkpoint.errors import CheckpointError, naming, together
from dist_asgd.checkpoint.loading.sources import CheckpointSource
from dist_asgd.checkpoint.progress import Progress
from dist_asgd.checkpoint.state.contents import destination_of
from dist_asgd.checkpoint.state.mismatches import Problems
from dist_asgd.comm.consensus import Agreement


def load_checkpoint(
    agreement: Agreement, source: CheckpointSource, state: Mapping[str, Any], *, strict: bool, average: bool | str
) -> None:
    """Fills ``state`` from a checkpoint. Collective; every rank gets the same one.

    Raises:
        CheckpointError: on every rank, with nothing changed, if it does not fit or a byte that is needed is damaged.
            With a part of it loaded, if a ``load_state_dict`` raises.
    """
    with together(agreement, "load()"), naming(source.url):
        destination = destination_of(
            state, source.tensors, source.values, source.paths, strict=strict, average=average, stock=source.is_stock
        )
    problems = Problems()
    for found in agreement.gather(destination.problems):
        problems = problems.merge(found)
    if problems:
        raise CheckpointError(f"{source.url} does not fit what it is loaded into\n{problems.message()}")
    wanted = [(key, entry) for key, entries in destination.tensors.items() for entry in entries]
    own, shared = source.reading(agreement, wanted)
    size = own.size + (shared.size if shared else 0)
    with own, shared or contextlib.nullcontext():
        progress = Progress(f"reading and verifying {source.url}", size, agreement.rank)
        with together(agreement, "load()"), naming(source.url):
            own.read(progress)
        if shared:
            with naming(source.url):
                shared.read(agreement, progress)
        with together(agreement, "load()"), naming(source.url):
            progress = Progress(f"loading {source.url}", size, agreement.rank)
            own.apply(progress)
            if shared:
                shared.apply(progress)
    with together(agreement, "load()"), _taken(source.url):
        destination.finish()


@contextlib.contextmanager
def _taken(url: str) -> Iterator[None]:
    """Tells that it is too late to change nothing."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"{url} is whole, but what was saved there is not accepted: {type(error).__name__}: {error}. The state is "
            "loaded in part now"
        ) from error
