"""Mismatches between a checkpoint and the live state that it is loaded into, collected for one error message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_LINES = 50  # entries that the message lists of each kind of mismatch


@dataclass(frozen=True, slots=True)
class Problems:
    """Mismatches of one rank or of several: four kinds, each with a text by the key of the entry. False if empty."""

    missing: dict[str, str] = field(default_factory=dict)
    unexpected: dict[str, str] = field(default_factory=dict)
    wrong_shape: dict[str, str] = field(default_factory=dict)
    wrong_dtype: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(found for _, found in self._kinds())

    def merge(self, other: Problems) -> Problems:
        """Returns the mismatches of ``self`` and ``other``; the text of ``self`` counts for a key that both have."""
        return Problems(
            {**other.missing, **self.missing},
            {**other.unexpected, **self.unexpected},
            {**other.wrong_shape, **self.wrong_shape},
            {**other.wrong_dtype, **self.wrong_dtype},
        )

    def message(self) -> str:
        """Returns a line for each kind, followed by its first ``MAX_LINES`` entries, a line each, sorted by key."""
        lines = []
        for title, found in self._kinds():
            if found:
                lines.append(f"{title} ({len(found)}):")
                lines += [f"  {key}: {text}" for key, text in sorted(found.items())[:MAX_LINES]]
                if len(found) > MAX_LINES:
                    lines.append(f"  ... and {len(found) - MAX_LINES} more")
        return "\n".join(lines)

    def _kinds(self) -> list[tuple[str, Mapping[str, str]]]:
        return [
            ("missing from the checkpoint", self.missing),
            ("unexpected in the checkpoint", self.unexpected),
            ("of another shape", self.wrong_shape),
            ("of another dtype or kind", self.wrong_dtype),
        ]


def truncate(text: str, limit: int) -> str:
    """Returns ``text``, cut to ``limit`` characters of which the last three are dots where it is longer."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
