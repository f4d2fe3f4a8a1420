"""What differs between two matched nodes themselves: operator, attributes, weights, dtype and shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from graphopt.diff.entries import Change
from graphopt.diff.matching import Marks
from graphopt.diff.operands import Mismatch
from graphopt.diff.pairing import Pairing
from graphopt.diff.tensors import TensorDiff, compare
from graphopt.diff.view import Item, View

__all__ = ["Changes"]

_SINGLE = 1e-7


class Changes:
    """Finds the changes of pairs, the weights of which it compares once each.

    Args:
        tolerance: relative difference up to which weights and attributes count as equal.
        weights: whether to read the weights; without, only their shapes and dtypes are compared.
    """

    def __init__(self, pairing: Pairing, marks: tuple[Marks, Marks], *, tolerance: float, weights: bool) -> None:
        self.pairing, self.marks = pairing, marks
        self.tolerance, self.weights = tolerance, weights
        self.tensors: dict[tuple[int, int], TensorDiff] = {}
        self._told: set[tuple[int, int]] = set()

    def of(self, i: int, j: int, mismatches: Sequence[Mismatch]) -> list[Change]:
        """The changes of one pair, in the order in which they matter."""
        x, y = self.pairing.a.items[i], self.pairing.b.items[j]
        found: list[Change] = []
        if x.operator != y.operator:
            found.append(Change("operator", "", x.operator, y.operator))
        found += self._operands(mismatches)
        found += self._weights(i, j)
        resized = self._resized(i, j) or any(
            change.tensor is not None and change.tensor.shape_a != change.tensor.shape_b for change in found
        )
        if x.operator == y.operator:
            found += self._attributes(x, y, derived=resized)
        found += self._value(i, j, derived=resized or any(not change.derived for change in found))
        return found

    def _operands(self, mismatches: Sequence[Mismatch]) -> list[Change]:
        names_a, names_b = self.pairing.a.items, self.pairing.b.items
        return [
            Change(
                "operand",
                one.slot,
                tuple(names_a[x].name for x in one.before),
                tuple(names_b[y].name for y in one.after),
            )
            for one in mismatches
            if one.rewired
        ]

    def _attributes(self, x: Item, y: Item, *, derived: bool) -> list[Change]:
        found = []
        given = {slot.partition("[")[0] for item in (x, y) for slot, _ in item.operands}
        for name in dict.fromkeys((*x.attributes, *y.attributes)):
            before, after = x.attributes.get(name), y.attributes.get(name)
            if name in given and (name not in x.attributes or name not in y.attributes):
                continue  # given on one side as an operand
            if not self._close(before, after):
                follows = derived and name in x.sizes | y.sizes
                found.append(Change("attribute", name, before, after, derived=follows))
        return found

    def _close(self, before: Any, after: Any) -> bool:
        if isinstance(before, tuple) and isinstance(after, tuple):
            return len(before) == len(after) and all(map(self._close, before, after))
        if isinstance(before, float) and isinstance(after, float):
            # ONNX keeps attributes in single precision.
            return before == after or math.isclose(before, after, rel_tol=max(self.tolerance, _SINGLE))
        return bool(before == after)

    def _value(self, i: int, j: int, *, derived: bool) -> list[Change]:
        x, y = self.pairing.a.items[i], self.pairing.b.items[j]
        if x.shape == y.shape:
            return []
        (dtype_x, _, dims_x), (dtype_y, _, dims_y) = x.shape.partition("["), y.shape.partition("[")
        found = []
        if dtype_x != dtype_y:
            follows = derived or self._operand_differs(i, j, dtype=True)
            found.append(Change("dtype", "", x.value.partition("[")[0], y.value.partition("[")[0], derived=follows))
        if dims_x != dims_y:
            found.append(Change("shape", "", x.value, y.value, derived=derived))
        return found

    def _resized(self, i: int, j: int) -> bool:
        """Whether something that the pair reads has another shape, so that its own shape follows."""
        return self._operand_differs(i, j, dtype=False)

    def _operand_differs(self, i: int, j: int, *, dtype: bool) -> bool:
        a, b = self.pairing.a, self.pairing.b
        before = [_part(a, source, dtype) for _, source in a.data_operands(i)]
        after = [_part(b, source, dtype) for _, source in b.data_operands(j)]
        return sorted(before) != sorted(after)

    def _weights(self, i: int, j: int) -> list[Change]:
        found: list[Change] = []
        for slot, x, y in _slots(self.pairing, self.marks, i, j):
            if x is None or y is None:
                found.append(Change("weight", slot, x and x.tensor, y and y.tensor))
                continue
            tensor = self.compare(x, y)
            if self.is_different(tensor):
                key = (x.index, y.index)
                found.append(Change("weight", slot, x.value, y.value, tensor, derived=key in self._told))
                self._told.add(key)
        return found

    def compare(self, x: Item, y: Item) -> TensorDiff:
        """What became of a tensor, remembered."""
        key = (x.index, y.index)
        if key not in self.tensors:
            a = self.pairing.a.model.params[x.tensor]
            b = self.pairing.b.model.params[y.tensor]
            if not self.weights:
                a, b = a.to("meta"), b.to("meta")
            self.tensors[key] = compare(a, b, x.tensor, y.tensor)
        return self.tensors[key]

    def is_different(self, tensor: TensorDiff) -> bool:
        """Whether the change of a tensor is one to report: another layout of the same numbers is none."""
        if tensor.relation in ("equal", "unknown", "transposed", "reshaped"):
            return tensor.relation == "unknown" and tensor.dtype_a != tensor.dtype_b
        return tensor.relation == "cast" or tensor.gap is None or not tensor.gap <= self.tolerance


def _part(view: View, index: int, dtype: bool) -> str:
    kind, _, dims = view.items[index].shape.partition("[")
    return kind if dtype else dims


def _slots(pairing: Pairing, marks: tuple[Marks, Marks], i: int, j: int) -> list[tuple[str, Item | None, Item | None]]:
    """The stored tensors of a pair that belong together: in equal slots, or else by content, or in order."""
    rows_a, rows_b = pairing.a.tensors(i), pairing.b.tensors(j)
    x, y = pairing.a.items[i], pairing.b.items[j]
    if x.operator == y.operator and not x.commutative:
        made = {slot for view, index in ((pairing.a, i), (pairing.b, j)) for slot, _ in view.data_operands(index)}
        slots = dict.fromkeys((*rows_a, *rows_b))
        return [(slot, rows_a.get(slot), rows_b.get(slot)) for slot in slots if slot not in made]
    # Where slots have no order, a tensor that is missing may be computed now, and then that is told elsewhere.
    operands = [sum(1 for _ in view.data_operands(at)) for view, at in ((pairing.a, i), (pairing.b, j))]
    computed = x.commutative and operands[0] != operands[1]
    found: list[tuple[str, Item | None, Item | None]] = []
    left = list(rows_b.values())
    rest = []
    for slot, row in rows_a.items():
        equal = next((r for r in left if marks[1][r.index].digest == marks[0][row.index].digest), None)
        if equal is None:
            rest.append((slot, row))
        else:
            left.remove(equal)
            found.append((slot, row, equal))
    for slot, row in rest:
        rank = len(row.value.split(","))
        near = next((r for r in left if len(r.value.split(",")) == rank), None)
        if near is not None:
            left.remove(near)
            found.append((slot, row, near))
        elif not computed:
            found.append((slot, row, None))
    if computed:
        return found
    return found + [(next(s for s, r in rows_b.items() if r is row), None, row) for row in left]
