"""What the terminal and Markdown show of a diff, as rows of plain text: lines of regions, costs, weights, shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graphopt.tools.console import size_text

if TYPE_CHECKING:
    from graphopt.diff import Entry, GraphDiff, Item, Pair, View

__all__ = [
    "TOTALS",
    "Fold",
    "Line",
    "cost_rows",
    "entry_lines",
    "folded",
    "module_rows",
    "operator_rows",
    "shape_rows",
    "side_rows",
    "weight_rows",
]

TOTALS = {
    "nodes": "operators",
    "macs": "multiply-accumulates",
    "operations": "other operations",
    "parameters": "parameters",
    "weight_bytes": "bytes of weights",
    "moved_bytes": "bytes moved",
    "peak_bytes": "peak bytes of activations",
}
_MOST = 16
"""Lines shown of one region."""


@dataclass(frozen=True)
class Line:
    """A line of a region: `-` is only in the first graph, `+` only in the second, `~` in both and changed."""

    mark: str
    text: str


@dataclass(frozen=True)
class Fold:
    """Entries with the same words in one module of the outermost level: the first stands for all."""

    module: str
    entries: tuple[Entry, ...]


def folded(diff: GraphDiff) -> list[Fold]:
    """The entries by their outermost module, alike ones together, in the order of the first graph."""
    found: dict[tuple[str, str, str, tuple[str, ...]], list[Entry]] = {}
    for entry in diff.entries:
        module = entry.path.partition(".")[0]
        key: tuple[str, str, str, tuple[str, ...]] = (module, entry.kind, entry.title, entry.passes)
        found.setdefault(key, []).append(entry)
    modules: dict[str, list[Fold]] = {}
    for key, entries in found.items():
        modules.setdefault(key[0], []).append(Fold(key[0], tuple(entries)))
    return [fold for folds in modules.values() for fold in folds]


def entry_lines(diff: GraphDiff, entry: Entry, context: int) -> list[Line]:
    """The nodes of an entry, and up to `context` unchanged ones before and behind it."""
    a, b = diff.a.view, diff.b.view
    lines: list[Line] = []
    before, after = _context(a, entry.a, context) if entry.a else _context(b, entry.b, context)
    home = a if entry.a else b
    lines += [Line(" ", node_text(home, index)) for index in before]
    lines += [Line("-", node_text(a, index)) for index in entry.removed]
    for pair in entry.pairs:
        lines += _pair_lines(diff, pair)
    lines += [Line("+", node_text(b, index)) for index in entry.inserted]
    if len(lines) > _MOST + 2 * context:
        kept = _MOST + context
        lines = [*lines[:kept], Line(" ", f"... {len(lines) - kept} more")]
    return lines + [Line(" ", node_text(home, index)) for index in after]


def _pair_lines(diff: GraphDiff, pair: Pair) -> Iterator[Line]:
    from graphopt.diff.titles import change_text

    x, y = diff.a.view.items[pair.a], diff.b.view.items[pair.b]
    name = x.name if x.name == y.name else f"{x.name} = {y.name}"
    label = f"{name}: {x.operator or x.kind}" + (f"  # {x.path}" if x.path else "")
    yield Line("~", label)
    for change in pair.changes:
        if not change.derived or change.kind in ("weight", "shape"):
            yield Line("~", f"    {change_text(change)}")


def _context(view: View, indices: Sequence[int], count: int) -> tuple[list[int], list[int]]:
    calls = [item.index for item in view.calls()]
    inside = [place for place, index in enumerate(calls) if index in set(indices)]
    if not inside or not count:
        return [], []
    first, last = inside[0], inside[-1]
    return calls[max(0, first - count) : first], calls[last + 1 : last + 1 + count]


def node_text(view: View, index: int) -> str:
    """A node as one line: what it is called, the operator, what it reads, what it makes and where it lies."""
    item = view.items[index]
    if item.kind == "tensor":
        return f"{item.name}: tensor '{item.tensor}' {item.value}"
    reads = ", ".join(_operand(view, source) for _, source in item.operands)
    place = f"  # {item.path}" if item.path else ""
    return f"{item.name}: {item.operator or item.kind}({reads}) {item.value}{place}"


def _operand(view: View, source: int) -> str:
    item: Item = view.items[source]
    return item.tensor if item.kind == "tensor" else item.name


def side_rows(diff: GraphDiff) -> list[tuple[str, str, str]]:
    """What either side is: its name, signature and history."""
    rows = []
    for label, side in (("a", diff.a), ("b", diff.b)):
        history = f" after {', '.join(side.model.history)}" if side.model.history else ""
        rows.append((label, side.source or "a model", f"{side.model.signature}{history}"))
    return rows


def cost_rows(diff: GraphDiff, *, every: bool = False) -> list[tuple[str, str, str, str]]:
    """Totals before and after, and their ratio; without `every`, only those that differ."""
    if diff.cost is None:
        return []
    return [
        (TOTALS[name], size_text(before), size_text(after), _ratio(before, after))
        for name, (before, after) in diff.cost.totals.items()
        if every or before != after
    ]


def _ratio(before: object, after: object) -> str:
    if isinstance(before, int) and isinstance(after, int) and before and before != after:
        return f"{100 * (after - before) / before:+.1f} %"
    return "" if before == after else "?" if not isinstance(before, int) else "new"


def operator_rows(diff: GraphDiff) -> list[tuple[str, int, int]]:
    """Operators of which there are more or fewer."""
    if diff.cost is None:
        return []
    names = {name: name.removeprefix("aten.").removesuffix(".default") for name in diff.cost.operators}
    return [(names[name], x, y) for name, (x, y) in diff.cost.operators.items() if x != y]


def module_rows(diff: GraphDiff) -> list[tuple[str, str, str, str, str]]:
    """Modules whose costs differ: multiply-accumulates and parameters before and after."""
    if diff.cost is None:
        return []
    rows = []
    for path, row in sorted(diff.cost.changed_modules().items()):
        macs, parameters = row["macs"], row["parameters"]
        rows.append((path or "(all)", *(size_text(size) for size in (*macs, *parameters))))
    return rows  # type: ignore[return-value]  # two and two sizes


def weight_rows(diff: GraphDiff) -> list[tuple[str, str, str]]:
    """Tensors that are not equal: names, shapes, and what became of them."""
    from graphopt.diff.titles import tensor_text

    rows = []
    for tensor in diff.tensors:
        if tensor.relation != "equal":
            same = tensor.name_a == tensor.name_b
            name = tensor.name_a if same else f"{tensor.name_a} = {tensor.name_b}"
            shapes = str(list(tensor.shape_a))
            if tensor.shape_a != tensor.shape_b:
                shapes += f" -> {list(tensor.shape_b)}"
            rows.append((name, shapes, tensor_text(tensor)))
    return rows


def shape_rows(diff: GraphDiff) -> list[tuple[str, str, str, str]]:
    """Matched nodes that make another shape or dtype, as a cause or as a consequence."""
    rows = []
    for pair in diff.pairs:
        item = diff.a.view.items[pair.a]
        for change in pair.changes:
            if change.kind in ("shape", "dtype"):
                note = "follows" if change.derived else ""
                rows.append((item.name, str(change.before), str(change.after), note))
    return rows
