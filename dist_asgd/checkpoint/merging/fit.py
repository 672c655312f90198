"""Compares the names, shapes and dtypes of all sources of a merge, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence

from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.format.entries import dtype_name
from dist_asgd.checkpoint.merging.sources import WeightSource

MAX_LINES = 50  # tensors that the message lists
MAX_SOURCES = 3  # sources that the message lists of those that agree


def check_fit(sources: Sequence[WeightSource]) -> None:
    """Raises ``CheckpointError``, which lists all tensors that differ in the sources or cannot be averaged."""
    names = dict.fromkeys(name for source in sources for name in source.tensors)
    lines = [line for name in names if (line := _difference(name, sources))]
    if not lines:
        return
    shown = "\n".join(f"  {line}" for line in lines[:MAX_LINES])
    more = f"\n  ... and {len(lines) - MAX_LINES} more" if len(lines) > MAX_LINES else ""
    raise CheckpointError(f"the sources cannot be merged, so nothing was written ({len(lines)}):\n{shown}{more}")


def _difference(name: str, sources: Sequence[WeightSource]) -> str:
    """Returns what keeps a tensor from being merged, or "" if nothing does."""
    found: dict[str, list[str]] = {}
    for source in sources:
        found.setdefault(_kind(name, source), []).append(source.name)
    if len(found) > 1:
        return f"{name}: " + "; ".join(f"{kind} in {_listed(where)}" for kind, where in found.items())
    dtype = sources[-1].dtypes[name]
    if len(sources) > 1 and dtype.is_floating_point and dtype.itemsize == 1:
        return f"{name}: {_kind(name, sources[-1])}, whose mean needs their scales: merge unquantized weights"
    return ""


def _kind(name: str, source: WeightSource) -> str:
    tensor = source.tensors.get(name)
    if tensor is None:
        return "missing"
    average = " without an average" if name in source.own else ""
    return f"{dtype_name(source.dtypes[name])} of shape {tensor.saved.shape}{average}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_SOURCES} more" if len(names) > MAX_SOURCES else ""
    return ", ".join(names[:MAX_SOURCES]) + more
