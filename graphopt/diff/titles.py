"""One line for a difference, the module it lies in, and what a value looks like on one line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from graphopt.diff.entries import Change, Entry
from graphopt.diff.tensors import TensorDiff
from graphopt.diff.view import Item, View

__all__ = ["change_text", "common_path", "tensor_text", "title_of", "value_text"]

_MOST = 6


def title_of(entry: Entry, a: View, b: View) -> str:
    """What the difference is, in one line."""
    left, right = ([view.items[index] for index in rows] for view, rows in ((a, entry.a), (b, entry.b)))
    if entry.kind == "rewritten":
        return f"{_operators(left)} -> {_operators(right)}"
    if entry.kind in ("inserted", "removed"):
        return _operators(right if entry.kind == "inserted" else left)
    if entry.kind in ("pruned", "widened"):
        layers = _operators([a.items[pair.a] for pair in entry.pairs])
        verb = "lose" if entry.kind == "pruned" else "gain"
        return f"{layers}: {verb} {len(entry.channels)} of {entry.of} channels"
    if entry.kind == "permuted":
        return f"{_operators(left)}: {entry.of} positions in another order"
    if entry.kind == "moved":
        return f"{_operators(left)}: stands elsewhere"
    pair = entry.pairs[0]
    name = a.items[pair.a].operator or a.items[pair.a].kind
    return f"{name}: {'; '.join(change_text(change) for change in pair.own)}"


def _operators(items: Iterable[Item]) -> str:
    names = [item.operator or ("constant" if item.kind == "tensor" else item.kind) for item in items]
    runs = [(name, len(list(run))) for name, run in groupby(names)]
    texts = [name if count == 1 else f"{count} x {name}" for name, count in runs]
    if len(texts) > _MOST:
        texts = [*texts[: _MOST - 1], f"{sum(count for _, count in runs[_MOST - 1 :])} more"]
    return " + ".join(texts)


def change_text(change: Change) -> str:
    """A change on one line."""
    if change.tensor is not None:
        return f"{change.name} {tensor_text(change.tensor)}"
    if change.kind == "weight":
        return f"{change.name} is {'new' if change.before is None else 'gone'}"
    if change.kind == "operand":
        slot = change.name or "operand"
        return f"{slot} was {value_text(change.before)}, is {value_text(change.after)}"
    label = change.name if change.kind == "attribute" else change.kind
    return f"{label} {value_text(change.before)} -> {value_text(change.after)}"


def tensor_text(tensor: TensorDiff) -> str:
    """What became of a tensor, in a few words."""
    relation = tensor.relation
    if relation == "sliced":
        parts = [
            f"axis {one.axis} {one.size_a} -> {one.size_b}, "
            f"{'without' if one.size_a > one.size_b else 'with'} {_positions(one.removed)}"
            for one in tensor.axes
        ]
        refitted = f", then changed by {tensor.error:.2g}" if tensor.error else ""
        return f"sliced: {'; '.join(parts)}{refitted}"
    if relation == "permuted":
        return f"permuted along axis {' and '.join(str(one.axis) for one in tensor.axes)}"
    if relation == "scaled":
        factor = f"by {tensor.scale:.6g}" if tensor.scale is not None else f"per position of axis {tensor.scale_axis}"
        return f"scaled {factor}"
    if relation == "cast":
        return f"{tensor.dtype_a} -> {tensor.dtype_b}, off by {tensor.error:.2g}"
    if relation == "resized":
        return f"{list(tensor.shape_a)} -> {list(tensor.shape_b)}"
    if relation == "different" and tensor.error is not None:
        return f"differs by {tensor.error:.2g} in {tensor.differing:,} elements"
    return str(relation)


def _positions(positions: Sequence[int]) -> str:
    shown = ", ".join(map(str, positions[:_MOST]))
    return shown if len(positions) <= _MOST else f"{shown}, ... ({len(positions)})"


def value_text(value: Any) -> str:
    """A value of an attribute as it is written."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(value_text, value))}]"
    return "nothing" if value is None else str(value)


def common_path(entry: Entry, a: View, b: View) -> str:
    """The module that all items lie in."""
    paths = [view.items[index].path.split(".") for view, rows in ((a, entry.a), (b, entry.b)) for index in rows]
    paths = [path for path in paths if path != [""]]
    if not paths:
        return ""
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
