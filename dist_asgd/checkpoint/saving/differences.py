"""Differences between ranks in what is saved once for all of them, collected for one error."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from dist_asgd.checkpoint.errors import CheckpointError

MAX_LINES = 50  # entries that the message lists
MAX_RANKS = 8  # ranks that the message lists of those that agree


@dataclass(frozen=True, slots=True)
class Differences:
    """Entries that ranks have different, by key, each with the ranks that agree."""

    found: dict[str, list[list[int]]] = field(default_factory=dict)

    def compare(self, key: str, by_rank: Mapping[int, Hashable]) -> None:
        """Adds the entry ``key`` if ``by_rank`` has different codes of it."""
        agreeing: dict[Hashable, list[int]] = {}
        for rank, code in by_rank.items():
            agreeing.setdefault(code, []).append(rank)
        if len(agreeing) > 1:
            self.found.setdefault(key, list(agreeing.values()))

    def require_none(self) -> None:
        """Raises ``CheckpointError`` if there are differences."""
        if not self.found:
            return
        lines = [f"  {key}: {' and '.join(map(_name, ranks))}" for key, ranks in sorted(self.found.items())[:MAX_LINES]]
        if len(self.found) > MAX_LINES:
            lines.append(f"  ... and {len(self.found) - MAX_LINES} more")
        raise CheckpointError(
            "ranks differ in what is saved once for all of them, so nothing was written. Different are on\n"
            + "\n".join(lines)
            + "\nMake them equal before training, as by broadcasting those of rank 0. Where each rank means its own, "
            "mark it in the state: {'model': PerRank(model)}, or give it a name of its own: {f'model{rank}': model}"
        )


def _name(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:MAX_RANKS])) + (", ..." if len(ranks) > MAX_RANKS else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}"
