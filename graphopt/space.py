"""What a search may try: ranges and choices that a pass declares for its options, in their text form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

__all__ = ["Choices", "Range", "Space", "Values"]


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included.

    Attributes:
        whole: only whole numbers; others are tried to two decimals.
        first: what is tried first; the middle by default.
    """

    low: float
    high: float
    whole: bool = False
    first: float | None = None

    def text(self, value: float) -> str:
        """A number as a pipeline writes it, brought into the range."""
        inside = min(max(value, self.low), self.high)
        return str(round(inside)) if self.whole else f"{inside:.2f}".rstrip("0").rstrip(".")

    @property
    def start(self) -> float:
        return (self.low + self.high) / 2 if self.first is None else self.first

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}"


@dataclass(frozen=True)
class Choices:
    """Values as a pipeline writes them. The first is tried first."""

    values: tuple[str, ...]

    @classmethod
    def of(cls, *values: str) -> Choices:
        return cls(values)

    def __str__(self) -> str:
        return "|".join(self.values)


Values = Range | Choices


@dataclass(frozen=True)
class Space:
    """What a search may try of one pass.

    Attributes:
        budgets: how much the pass may take away, by option. A pipeline gives one of them; the part of a latency is
            `latency`, that of the weights `params`.
        options: what else may be tried, by option; each is given.
        place: where the pass usually stands in a pipeline, from 0, first, to 1, last.
    """

    budgets: Mapping[str, Values] = field(default_factory=lambda: MappingProxyType({}))
    options: Mapping[str, Values] = field(default_factory=lambda: MappingProxyType({}))
    place: float = 0.5
