"""Mismatches between a checkpoint and the live state that it is loaded into, collected for one error message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_LINES = 50  # entries that the message lists of each kind of mismatch


@dataclass(frozen=True, slots=True)
class Problems:
    """Mismatches of one rank or of several, by their kind, each with a text by the key of the entry. False if empty."""

    missing: dict[str, str] = field(default_factory=dict)
    unexpected: dict[str, str] = field(default_factory=dict)
    wrong_shape: dict[str, str] = field(default_factory=dict)
    wrong_dtype: dict[str, str] = field(default_factory=dict)
    castable: dict[str, str] = field(default_factory=dict)  # of a dtype that ``load(..., cast=True)`` converts

    def __bool__(self) -> bool:
        return any(found for _, found in self._kinds())

    def merge(self, other: Problems) -> Problems:
        """Returns the mismatches of ``self`` and ``other``; the text of ``self`` counts for a key that both have."""
        return Problems(
            {**other.missing, **self.missing},
            {**other.unexpected, **self.unexpected},
            {**other.wrong_shape, **self.wrong_shape},
            {**other.wrong_dtype, **self.wrong_dtype},
            {**other.castable, **self.castable},
        )

    def message(self) -> str:
        """Returns a line for each kind, followed by ``listed`` entries."""
        return "\n".join(f"{title} ({len(found)}):\n{listed(found)}" for title, found in self._kinds() if found)

    def _kinds(self) -> list[tuple[str, Mapping[str, str]]]:
        return [
            ("missing from the checkpoint", self.missing),
            ("unexpected in the checkpoint", self.unexpected),
            ("of another shape", self.wrong_shape),
            ("of another dtype or kind", self.wrong_dtype),
            ("of another dtype, which load(..., cast=True) converts", self.castable),
        ]


def listed(found: Mapping[str, str]) -> str:
    """Returns a line for each of the first ``MAX_LINES`` entries, sorted by key, and one that counts the others."""
    lines = [f"  {key}: {text}" for key, text in sorted(found.items())[:MAX_LINES]]
    if len(found) > MAX_LINES:
        lines.append(f"  ... and {len(found) - MAX_LINES} more")
    return "\n".join(lines)


def truncate(text: str, limit: int) -> str:
    """Returns ``text``, cut to ``limit`` characters of which the last three are dots where it is longer."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
