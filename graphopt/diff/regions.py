"""Which inserted, removed and changed nodes are one difference: a region that became another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from graphopt.diff.entries import Change
from graphopt.diff.matching import Marks
from graphopt.diff.operands import Mismatch
from graphopt.diff.pairing import Pairing
from graphopt.diff.view import View, family

__all__ = ["Region", "find_regions"]

_Element = tuple[str, int]
"""`a` or `b` with an item that has no partner, `pair` with the number of a pair."""

_AFFINE = {"add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "rsub.Scalar", "add.Scalar", "mul.Scalar"}
_ABSORBED = {"batch norm", "layer norm", "matrix product", "convolution", "group_norm", "rms_norm"}
_PRODUCTS = {"matrix product", "convolution"}
_REORDERED = {"getitem", "split_with_sizes", "split.Tensor", "chunk", "slice.Tensor", "cat", "unbind.int"}


@dataclass(slots=True)
class Region:
    """Items without partner on either side, the tensors that took the place of a call, and pairs that belong to it."""

    removed: list[int] = field(default_factory=list)
    inserted: list[int] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)

    @property
    def rewritten(self) -> bool:
        """Whether something became something else, and not only came or went."""
        return bool(self.removed and self.inserted) or bool(self.pairs)


class _Sets:
    """Union-find."""

    def __init__(self) -> None:
        self._parent: dict[_Element, _Element] = {}

    def find(self, element: _Element) -> _Element:
        parent = self._parent.setdefault(element, element)
        while parent != self._parent[parent]:
            self._parent[parent] = self._parent[self._parent[parent]]
            parent = self._parent[parent]
        self._parent[element] = parent
        return parent

    def join(self, elements: Iterable[_Element]) -> None:
        first = None
        for element in elements:
            root = self.find(element)
            if first is None:
                first = root
            elif root != first:
                self._parent[root] = first

    def groups(self) -> dict[_Element, list[_Element]]:
        found: dict[_Element, list[_Element]] = {}
        for element in sorted(self._parent):
            found.setdefault(self.find(element), []).append(element)
        return found


def find_regions(
    pairing: Pairing,
    mismatches: Mapping[int, Sequence[Mismatch]],
    changes: Mapping[int, Sequence[Change]],
    marks: tuple[Marks, Marks],
) -> list[Region]:
    """All regions: each removed or inserted call or input is in exactly one.

    Args:
        mismatches, changes: of the pairs, by number, that have any.
    """
    sets = _Sets()
    for side, view, mate in (("a", pairing.a, pairing.mate_a), ("b", pairing.b, pairing.mate_b)):
        for item in view.items:
            if mate[item.index] is None and item.kind in ("call", "input"):
                sets.find((side, item.index))
    _join_replaced(sets, pairing, mismatches)
    for side, view, mate in (("a", pairing.a, pairing.mate_a), ("b", pairing.b, pairing.mate_b)):
        _join_adjacent(sets, side, view, mate)
        _join_absorbed(sets, side, view, mate, pairing, changes)
    _join_moved_tensors(sets, pairing, changes, marks)
    return [piece for group in sets.groups().values() for piece in _pieces(group, pairing)]


def _join_replaced(sets: _Sets, pairing: Pairing, mismatches: Mapping[int, Sequence[Mismatch]]) -> None:
    """What fed a pair, and what feeds it in its place."""
    for number, rows in mismatches.items():
        j = pairing.mate_a[number]
        assert j is not None
        for one in rows:
            free_a = [("a", x) for x in one.before if pairing.mate_a[x] is None]
            free_b = [("b", y) for y in one.after if pairing.mate_b[y] is None]
            if free_a and not one.after:
                free_b += _stored("b", pairing.b, j, one.slot, len(pairing.a.tensors(number)))
            if free_b and not one.before:
                free_a += _stored("a", pairing.a, number, one.slot, len(pairing.b.tensors(j)))
            if free_a and free_b:
                sets.join(free_a + free_b)
            if one.rewired and (free_a or free_b):
                sets.join([("pair", number), *free_a, *free_b])


def _stored(side: str, view: View, index: int, slot: str, others: int) -> list[_Element]:
    """The stored tensor in a slot: a call that became a constant, or the other way round. Where the slots of a call
    have no order, it is one if there are more than the `others` on the other side.
    """
    rows = view.tensors(index)
    if view.items[index].commutative:
        return [(side, row.index) for row in rows.values()] if len(rows) > others == 0 else []
    return [(side, row.index) for name, row in rows.items() if name.partition("[")[0] == slot]


def _join_adjacent(sets: _Sets, side: str, view: View, mate: Sequence[int | None]) -> None:
    for item in view.calls():
        if mate[item.index] is None:
            near = [
                (side, source)
                for _, source in item.operands
                if mate[source] is None and view.items[source].kind == "call"
            ]
            sets.join([(side, item.index), *near])


def _join_absorbed(
    sets: _Sets,
    side: str,
    view: View,
    mate: Sequence[int | None],
    pairing: Pairing,
    changes: Mapping[int, Sequence[Change]],
) -> None:
    """A layer whose weights changed, with the affine operators beside it that came or went: one was folded."""
    numbers = pairing.number_a if side == "a" else pairing.number_b
    for item in view.calls():
        if mate[item.index] is not None:
            continue
        near = [source for _, source in view.data_operands(item.index)] + [user for _, user in view.users[item.index]]
        for other in near:
            number = numbers[other]
            rows = changes.get(number, ()) if number is not None else ()
            if number is not None and any(_absorbs(row, item.operator) for row in rows if not row.derived):
                sets.join([("pair", number), (side, item.index)])


def _absorbs(change: Change, name: str) -> bool:
    if change.kind == "operator":
        return name in _AFFINE or family(name) in ("transposition", "shape")
    if change.kind != "weight":
        return False
    if change.tensor is not None and change.tensor.relation == "resized" and family(name) in _PRODUCTS:
        return True  # a layer that became two factors, or two that became one
    if change.tensor is not None and change.tensor.relation in ("resized", "sliced"):
        return name in _REORDERED  # products that were merged, and whose results are taken apart
    return name in _AFFINE or family(name) in _ABSORBED


def _join_moved_tensors(
    sets: _Sets, pairing: Pairing, changes: Mapping[int, Sequence[Change]], marks: tuple[Marks, Marks]
) -> None:
    """A pair that lost a tensor, with what reads the same tensor now: a bias that became an addition."""
    readers: list[dict[bytes, list[_Element]]] = []
    for side, view, mate, digests in (
        ("a", pairing.a, pairing.mate_a, marks[0]),
        ("b", pairing.b, pairing.mate_b, marks[1]),
    ):
        found: dict[bytes, list[_Element]] = {}
        for item in view.calls():
            if mate[item.index] is None:
                for row in view.tensors(item.index).values():
                    found.setdefault(digests[row.index].digest, []).append((side, item.index))
        readers.append(found)
    names = [{item.tensor: item.index for item in view.items if item.tensor} for view in (pairing.a, pairing.b)]
    for number, found_changes in changes.items():
        for change in found_changes:
            if change.kind != "weight" or change.tensor is not None:
                continue
            which = 0 if change.after is None else 1
            digest = marks[which][names[which][change.before if which == 0 else change.after]].digest
            others = readers[1 - which].get(digest, [])
            if len(others) == 1:
                sets.join([("pair", number), *others])


def _pieces(group: list[_Element], pairing: Pairing) -> list[Region]:
    """One region, or, where things only came or only went, one for each of them."""
    region = Region(
        [index for side, index in group if side == "a"],
        [index for side, index in group if side == "b"],
        [index for side, index in group if side == "pair"],
    )
    if region.rewritten:
        return [region]
    view, members = (pairing.a, region.removed) if region.removed else (pairing.b, region.inserted)
    pieces: list[list[int]] = []
    home: dict[int, list[int]] = {}
    for index in members:
        sources = [source for _, source in view.items[index].operands if source in home]
        if view.items[index].operator == "getitem" and sources:
            home[sources[0]].append(index)  # one result of a call belongs to the call
            home[index] = home[sources[0]]
        else:
            home[index] = [index]
            pieces.append(home[index])
    return [Region(removed=piece) if region.removed else Region(inserted=piece) for piece in pieces]
