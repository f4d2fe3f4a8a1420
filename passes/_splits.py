"""One budget over several ways to spend it: which share each of them gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

__all__ = ["SHARES", "Split", "best_split", "goals", "splits"]

Split = tuple[int, ...]
"""Of `SHARES` shares of a budget, how many each way to spend it gets."""

SHARES = 4
_NEVER = float("inf")


def goals(split: Split, part: float) -> tuple[float, ...]:
    """The part of the cost that is left when each way has had its turn, in order: `part ** (shares so far / SHARES)`,
    so that equal shares leave equal parts of what each of them found."""
    return tuple(part ** (sum(split[: place + 1]) / SHARES) for place in range(len(split)))


def best_split(ways: int, loss: Callable[[Split], float]) -> Split | None:
    """The split that loses least among those that were looked at; None where none has a finite loss.

    Each way is looked at alone. From the best of them on, a share is moved between two ways while that loses less.
    Where no way can do it alone, all splits are looked at.
    """
    known: dict[Split, float] = {}

    def of(split: Split) -> float:
        if split not in known:
            known[split] = loss(split)
        return known[split]

    alone = [tuple(SHARES * (place == way) for place in range(ways)) for way in range(ways)]
    best = min(alone, key=of)
    if of(best) == _NEVER:
        best = min(splits(ways), key=of)
        return None if of(best) == _NEVER else best
    while True:
        nearest = min(_neighbours(best), key=of, default=best)
        if not of(nearest) < of(best):
            return best
        best = nearest


def splits(ways: int) -> Iterator[Split]:
    """All of them."""
    if ways == 1:
        yield (SHARES,)
        return
    ends: list[Split] = [()]
    for _ in range(ways - 1):
        ends = [(*end, more) for end in ends for more in range(end[-1] if end else 0, SHARES + 1)]
    for end in ends:
        yield tuple(b - a for a, b in pairwise((0, *end, SHARES)))


def _neighbours(split: Split) -> Iterator[Split]:
    for source, count in enumerate(split):
        for sink in range(len(split)):
            if count and sink != source:
                yield tuple(n - (place == source) + (place == sink) for place, n in enumerate(split))
