"""Both graphs as one, so that one drawing serves both: a row for each node or matched pair, folded by module.

Where the two sides are drawn from one layout, what is matched stands in the same place on both (a foresighted layout:
S. Diehl and C. Goerg, Graphs, They Are Changing, GD 2002).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from graphopt.diff.result import GraphDiff
from graphopt.diff.view import Item, View

__all__ = ["Group", "Row", "groups_of", "rows_of"]

_MOST = 60
"""So many things in one group are still easy to read; of more, neighbours are put into parts."""
_PART = 40
"""So many things, or parts of things, are put into one part at most."""


@dataclass(frozen=True, slots=True)
class Row:
    """A node of the first graph, of the second, or of both; `path` is the module it is drawn in."""

    a: int | None
    b: int | None
    path: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """The rows from `first` to `last`, which can be folded into one; `parent` is the number of the group around it."""

    label: str
    path: str
    first: int
    last: int
    parent: int | None


def rows_of(diff: GraphDiff) -> list[Row]:
    """Every node that is drawn, in the order of the first graph; what the second adds stands behind what it reads.

    Moved pairs are two rows, as they stand in two places. Stored tensors are part of what reads them.
    """
    a, b = diff.a.view, diff.b.view
    moved = {pair.a for entry in diff.entries if entry.kind == "moved" for pair in entry.pairs}
    mates = {pair.a: pair.b for pair in diff.pairs if pair.a not in moved}
    order = [item.index for item in a.items if _is_drawn(a, item)]
    behind = _inserted(b, order, {j: i for i, j in mates.items()})
    pairs: list[tuple[int | None, int | None]] = [(None, j) for j in behind.get(-1, ())]
    for i in order:
        pairs.append((i, mates.get(i)))
        pairs += [(None, j) for j in behind.get(i, ())]
    paths = [_path(a, i) or _path(b, j) for i, j in pairs]
    return [Row(i, j, path) for (i, j), path in zip(pairs, _filled(paths), strict=True)]


def _is_drawn(view: View, item: Item) -> bool:
    return item.kind != "tensor" or any(view.items[user].kind == "output" for _, user in view.users[item.index])


def _inserted(b: View, order: Sequence[int], mates: dict[int, int]) -> dict[int, list[int]]:
    """What only the second graph has, by the item of the first that it stands behind; -1 for the beginning."""
    place = {i: position for position, i in enumerate(order)}
    anchors: dict[int, int] = {}
    found: dict[int, list[int]] = {}
    last = -1
    for item in b.items:
        mate = mates.get(item.index)
        if mate is not None and mate in place:
            anchors[item.index] = last = place[mate]
        elif _is_drawn(b, item):
            read = [anchors[source] for _, source in item.operands if source in anchors]
            anchors[item.index] = max(read, default=last)
            found.setdefault(order[anchors[item.index]] if anchors[item.index] >= 0 else -1, []).append(item.index)
    return found


def _path(view: View, index: int | None) -> tuple[str, ...]:
    path = "" if index is None else view.items[index].path
    return tuple(path.split(".")) if path else ()


def _filled(paths: list[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """What a pass made without a path lies in the module that is around it on both sides."""
    before: tuple[str, ...] = ()
    after: list[tuple[str, ...]] = []
    for path in reversed(paths):
        after.append(path or (after[-1] if after else ()))
    for path, behind in zip(paths, reversed(after), strict=True):
        yield path or _common(before, behind)
        before = path or before


def _common(x: tuple[str, ...], y: tuple[str, ...]) -> tuple[str, ...]:
    count = 0
    while count < min(len(x), len(y)) and x[count] == y[count]:
        count += 1
    return x[:count]


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """The groups, outer ones first. Each is a stretch of rows, so folding it makes no cycle where there was none."""
    groups: list[Group] = []
    _divide(rows, range(len(rows)), 0, None, groups)
    return groups


_Stretch = tuple[str, str, range, int]
"""A label, a path, rows, and how many parts of their paths are used up; without a label, a single row."""


def _divide(rows: Sequence[Row], stretch: range, depth: int, parent: int | None, groups: list[Group]) -> None:
    parts = _runs(rows, stretch, depth)
    if parent is not None and len(parts) == 1 and parts[0][0]:  # a module with nothing but one module in it
        outer = groups[parent]
        label, path, _, below = parts[0]
        groups[parent] = Group(f"{outer.label}.{label}", path, outer.first, outer.last, outer.parent)
        _divide(rows, stretch, below, parent, groups)
        return
    _place(rows, parts, parent, groups)


def _place(rows: Sequence[Row], parts: list[_Stretch], parent: int | None, groups: list[Group]) -> None:
    if len(parts) > _MOST:
        pieces = _pieces(parts)
        for number, piece in enumerate(pieces, 1):
            own = len(groups)
            groups.append(Group(f"part {number} of {len(pieces)}", "", piece[0][2][0], piece[-1][2][-1], parent))
            _place(rows, piece, own, groups)
        return
    for label, path, stretch, below in parts:
        if label:
            groups.append(Group(label, path, stretch[0], stretch[-1], parent))
            _divide(rows, stretch, below, len(groups) - 1, groups)


def _pieces(parts: list[_Stretch]) -> list[list[_Stretch]]:
    """As few as there can be when each holds at most `_PART` things, pieces of pieces included; all about as large."""
    size = _PART
    while size * _PART < len(parts):
        size *= _PART
    count = -(-len(parts) // size)
    ends = [round(number * len(parts) / count) for number in range(count + 1)]
    return [parts[start:end] for start, end in pairwise(ends)]


def _runs(rows: Sequence[Row], stretch: range, depth: int) -> list[_Stretch]:
    """Neighbours in one module together, others each by itself."""
    found: list[_Stretch] = []
    for label, run in groupby(stretch, key=lambda row: rows[row].path[depth] if len(rows[row].path) > depth else ""):
        members = list(run)
        if label and len(members) > 1:
            path = ".".join(rows[members[0]].path[: depth + 1])
            found.append((label, path, range(members[0], members[-1] + 1), depth + 1))
        else:
            found += [("", "", range(row, row + 1), depth) for row in members]
    return found
