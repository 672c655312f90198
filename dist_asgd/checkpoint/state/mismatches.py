"""Everything in which a checkpoint and live state differ, for one error that says it all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_LINES = 50  # of each kind


@dataclass(frozen=True, slots=True)
class Problems:
    """By key, what is wrong with the entry; of each kind."""

    missing: dict[str, str] = field(default_factory=dict)
    unexpected: dict[str, str] = field(default_factory=dict)
    wrong_shape: dict[str, str] = field(default_factory=dict)
    wrong_dtype: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(found for _, found in self._kinds())

    def merge(self, other: Problems) -> Problems:
        """Those of both, such as two ranks. Where both have a key, what this one says of it."""
        return Problems(
            {**other.missing, **self.missing},
            {**other.unexpected, **self.unexpected},
            {**other.wrong_shape, **self.wrong_shape},
            {**other.wrong_dtype, **self.wrong_dtype},
        )

    def message(self) -> str:
        """A line for each kind and each entry, sorted; at most ``MAX_LINES`` entries of a kind."""
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
