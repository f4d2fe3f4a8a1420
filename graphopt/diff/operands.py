"""Whether two matched nodes read the same things, where what was inserted or removed between is looked through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.diff.pairing import Pairing
from graphopt.diff.view import View

__all__ = ["Mismatch", "Operands"]

_FAR = 256
"""Nodes that are looked through at most, above one operand."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Operands of a pair that do not correspond.

    `before` and `after` are the sources on either side. `rewired`: the pair reads something else, which nothing that
    was inserted or removed between explains.
    """

    slot: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    rewired: bool


class Operands:
    """Compares operands of pairs.

    Args:
        values: for both views a number for what each item computes, equal for equal values.

    `hidden` are pairs, by number, that are taken to stand elsewhere: they are looked through as if they were
    inserted and removed.
    """

    def __init__(self, pairing: Pairing, values: tuple[Sequence[int], Sequence[int]]) -> None:
        self.pairing, self.values = pairing, values
        self.hidden: set[int] = set()
        self._found: tuple[dict[int, frozenset[int]], dict[int, frozenset[int]]] = ({}, {})

    def hide(self, numbers: set[int]) -> None:
        """Take these pairs, and no others, to stand elsewhere."""
        self.hidden = numbers
        self._found = ({}, {})

    def mismatches(self, i: int, j: int) -> list[Mismatch]:
        """The slots in which the pair does not read the same."""
        rows_a, rows_b = self._rows(self.pairing.a, i), self._rows(self.pairing.b, j)
        if self.pairing.a.items[i].operator != self.pairing.b.items[j].operator:
            # Two forms of one operator have other names for the same operands.
            rows_a, rows_b = (dict(zip(map(str, range(len(r))), r.values(), strict=True)) for r in (rows_a, rows_b))
        found = []
        for slot in dict.fromkeys((*rows_a, *rows_b)):
            before, after = rows_a.get(slot, []), rows_b.get(slot, [])
            left_a, left_b = self._without_same(before, after, ordered=not self.pairing.a.items[i].commutative)
            if left_a or left_b:
                found.append(Mismatch(slot, tuple(left_a), tuple(left_b), self._is_rewired(left_a, left_b)))
        return found

    def _rows(self, view: View, index: int) -> dict[str, list[int]]:
        """Data operands by slot; the parts of a list, and the two operands of a commutative call, are in one."""
        rows: dict[str, list[int]] = {}
        commutative = view.items[index].commutative
        for slot, source in view.data_operands(index):
            rows.setdefault("" if commutative else slot.partition("[")[0], []).append(source)
        return rows

    def _without_same(self, before: list[int], after: list[int], *, ordered: bool) -> tuple[list[int], list[int]]:
        if len(before) == len(after) and all(map(self.same, before, after)):
            return [], []
        left_a, left_b = [], list(after)
        at = 0
        for source in before:
            start = at if ordered else 0
            place = next((p for p in range(start, len(left_b)) if self.same(source, left_b[p])), None)
            if place is None:
                left_a.append(source)
            else:
                del left_b[place]
                at = place
        return left_a, left_b

    def same(self, x: int, y: int) -> bool:
        """Whether item `x` of `a` and `y` of `b` are one pair that stands where it stood, or compute one value."""
        number = self.pairing.number_a[x]
        if number is not None and number == self.pairing.number_b[y]:
            return number not in self.hidden
        return self.values[0][x] == self.values[1][y]

    def _is_rewired(self, before: list[int], after: list[int]) -> bool:
        """Whether no way through inserted, removed and moved nodes leads from these sources to common ones."""
        if not before and not after:
            return False
        fixed_a = [x for x in before if self._stands(x, side=0)]
        fixed_b = [y for y in after if self._stands(y, side=1)]
        reach_a = frozenset[int]().union(*(self.reach(x, side=0) for x in before))
        reach_b = frozenset[int]().union(*(self.reach(y, side=1) for y in after))
        if len(fixed_a) == len(before) and len(fixed_b) == len(after):
            return True
        if not fixed_a and not fixed_b:
            return bool(reach_a and reach_b and not reach_a & reach_b)
        # What stands where it stood has to be found behind what does not, on the other side.
        return any(not self._behind(x, reach_b, after, 0) for x in fixed_a) or any(
            not self._behind(y, reach_a, before, 1) for y in fixed_b
        )

    def _behind(self, index: int, reach: frozenset[int], others: list[int], side: int) -> bool:
        number = (self.pairing.number_a, self.pairing.number_b)[side][index]
        if number in reach:
            return True
        if not others:  # a slot, or a place in a list, that the other side does not have
            return False
        values = self.values[side][index]
        return any(self.values[1 - side][other] == values for other in others)

    def _stands(self, index: int, *, side: int) -> bool:
        number = (self.pairing.number_a, self.pairing.number_b)[side][index]
        return number is not None and number not in self.hidden

    def reach(self, index: int, *, side: int) -> frozenset[int]:
        """The numbers of the nearest pairs at or above an item that stand where they stood."""
        found = self._found[side].get(index)
        if found is None:
            view, numbers = (
                (self.pairing.a, self.pairing.number_a) if side == 0 else (self.pairing.b, self.pairing.number_b)
            )
            found = self._found[side][index] = self._search(view, numbers, index)
        return found

    def _search(self, view: View, numbers: Sequence[int | None], index: int) -> frozenset[int]:
        found: set[int] = set()
        seen, stack = {index}, [index]
        while stack and len(seen) < _FAR:
            at = stack.pop()
            number = numbers[at]
            if number is not None and number not in self.hidden:
                found.add(number)
                continue
            for _, source in view.data_operands(at):
                if source not in seen:
                    seen.add(source)
                    stack.append(source)
        return frozenset(found)
