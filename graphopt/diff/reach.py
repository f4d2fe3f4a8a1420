"""The nearest matched nodes above and below one, looking through those without partner."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.diff.pairing import Pairing
from graphopt.diff.view import View

__all__ = ["Support", "nearest"]

_FAR = 64


def nearest(view: View, numbers: Sequence[int | None], index: int, *, up: bool) -> frozenset[int]:
    """The numbers of the nearest pairs above or below an item."""
    found: set[int] = set()
    seen = {index}
    stack = [index]
    while stack and len(seen) < _FAR:
        at = stack.pop()
        near = (source for _, source in view.data_operands(at)) if up else (user for _, user in view.users[at])
        for other in near:
            number = numbers[other]
            if number is not None:
                found.add(number)
            elif other not in seen:
                seen.add(other)
                stack.append(other)
    return frozenset(found)


class Support:
    """How much the surroundings of two items speak for their being a pair, as the pairs are now."""

    def __init__(self, pairing: Pairing) -> None:
        self.pairing = pairing
        self._known: dict[tuple[int, int, bool], frozenset[int]] = {}

    def near(self, side: int, index: int, *, up: bool) -> frozenset[int]:
        """The nearest pairs of an item of `a` (side 0) or `b` (side 1), remembered."""
        key = (side, index, up)
        if key not in self._known:
            view, numbers = (
                (self.pairing.a, self.pairing.number_a) if side == 0 else (self.pairing.b, self.pairing.number_b)
            )
            self._known[key] = nearest(view, numbers, index, up=up)
        return self._known[key]

    def __call__(self, i: int, j: int) -> int:
        """Zero to three: whether the pairs nearest above, and those nearest below, have any in common."""
        above = bool(self.near(0, i, up=True) & self.near(1, j, up=True))
        return 2 * above + bool(self.near(0, i, up=False) & self.near(1, j, up=False))
