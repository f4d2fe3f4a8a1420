"""The pairs found so far: one-to-one, and quick to ask from either side."""

from __future__ import annotations

from collections.abc import Iterator

from graphopt.diff.view import Item, View

__all__ = ["Pairing", "alike"]


class Pairing:
    """Which item of `a` is which item of `b`.

    `number_a[i]` is the number of the pair that item `i` of `a` belongs to, None where it has none; `mate_a[i]` is the
    item of `b` in it. The number of a pair is the item of `a` in it.
    """

    def __init__(self, a: View, b: View) -> None:
        self.a, self.b = a, b
        self.mate_a: list[int | None] = [None] * len(a.items)
        self.mate_b: list[int | None] = [None] * len(b.items)
        self.number_a: list[int | None] = [None] * len(a.items)
        self.number_b: list[int | None] = [None] * len(b.items)
        self.count = 0

    def pair(self, i: int, j: int) -> None:
        """Note that item `i` of `a` is item `j` of `b`; neither may have a mate."""
        assert self.mate_a[i] is None and self.mate_b[j] is None
        self.mate_a[i], self.mate_b[j] = j, i
        self.number_a[i] = self.number_b[j] = i
        self.count += 1

    def part(self, i: int) -> None:
        """Take the pair of item `i` of `a` back."""
        j = self.mate_a[i]
        assert j is not None
        self.mate_a[i] = self.mate_b[j] = self.number_a[i] = self.number_b[j] = None
        self.count -= 1

    def free(self, i: int, j: int) -> bool:
        """Whether neither has a mate."""
        return self.mate_a[i] is None and self.mate_b[j] is None

    def pairs(self) -> Iterator[tuple[int, int]]:
        """All pairs in the order of `a`."""
        return ((i, j) for i, j in enumerate(self.mate_a) if j is not None)

    def free_calls_a(self) -> list[Item]:
        return [item for item in self.a.calls() if self.mate_a[item.index] is None]

    def free_calls_b(self) -> list[Item]:
        return [item for item in self.b.calls() if self.mate_b[item.index] is None]


def alike(a: View, b: View, i: int, j: int) -> int:
    """How much speaks for a pair of equal operators: attributes, module path, names of tensors, name. Breaks ties."""
    x, y = a.items[i], b.items[j]
    score = 0
    if x.operator == y.operator:
        score += 16
    if x.attributes == y.attributes:
        score += 8
    if x.path and x.path == y.path:
        score += 4
    names = [row.tensor for row in a.tensors(i).values()]
    if names and names == [row.tensor for row in b.tensors(j).values()]:
        score += 4
    if x.shape == y.shape:
        score += 2
    return score + (x.name == y.name)
