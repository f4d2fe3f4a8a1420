"""What the page of a comparison shows, as plain data: graphs, steps from one to the next, and what changed in each.

Strings are as the models have them. The page writes them as text, characters that hide or act as numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from graphopt.analysis.cost import cost
from graphopt.diff.entries import Entry
from graphopt.diff.histograms import Histogram, histogram
from graphopt.diff.result import GraphDiff, Side
from graphopt.diff.supergraph import Row, groups_of, rows_of
from graphopt.diff.tensors import TensorDiff
from graphopt.diff.titles import change_text, tensor_text, value_text
from graphopt.diff.view import Item
from graphopt.ops import Size
from graphopt.transform import Edit, Miss

__all__ = ["PageData"]


@dataclass
class PageData:
    """Collects comparisons, and steps that show them.

    A graph that two comparisons share, as one pass ends where the next begins, is held once, and so is the histogram of
    a weight that stays as it is.
    """

    title: str
    graphs: list[dict[str, Any]] = field(default_factory=list)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    _sides: list[Side] = field(default_factory=list)
    _counted: dict[tuple[object, ...], Histogram | None] = field(default_factory=dict)
    _kept: list[torch.Tensor] = field(default_factory=list)

    def compare(self, diff: GraphDiff) -> int:
        """Add a comparison; returns its number."""
        rows = rows_of(diff)
        self.comparisons.append(
            {
                "a": self._graph(diff.a),
                "b": self._graph(diff.b),
                "summary": diff.summary(),
                "rows": [[row.a, row.b] for row in rows],
                "groups": [asdict(group) for group in groups_of(rows)],
                "links": [[p.a, p.b] for entry in diff.entries if entry.kind == "moved" for p in entry.pairs],
                "entries": _entries(diff, rows),
                "changes": [
                    [pair.a, pair.b, [[change.kind, change_text(change), change.derived] for change in pair.changes]]
                    for pair in diff.pairs
                    if pair.changes
                ],
                "tensors": [*(self._tensor(diff, tensor) for tensor in diff.tensors), *self._alone(diff)],
                "cost": {name: [_size(x), _size(y)] for name, (x, y) in diff.cost.totals.items()} if diff.cost else {},
                "numbers": _numbers(diff),
            }
        )
        return len(self.comparisons) - 1

    def step(self, title: str, comparison: int, edits: Iterable[Edit] = (), misses: Iterable[Miss] = ()) -> None:
        """Show a comparison under a title, with the journal of the pass that made the second model of the first."""
        self.steps.append(
            {
                "title": title,
                "comparison": comparison,
                "edits": [asdict(edit) | {"kind": edit.kind.value} for edit in edits],
                "misses": [asdict(miss) for miss in dict.fromkeys(misses)],
            }
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "graphs": self.graphs,
            "comparisons": self.comparisons,
            "steps": self.steps,
        }

    def _graph(self, side: Side) -> int:
        for number, known in enumerate(self._sides):
            if known.model is side.model:
                return number
        macs = {node.name: _size(node.macs) for node in cost(side.model).nodes}
        self._sides.append(side)
        self.graphs.append(
            {
                "source": side.source or "a model",
                "signature": str(side.model.signature),
                "history": list(side.model.history),
                "nodes": [_node(item, macs.get(item.name)) for item in side.view.items],
            }
        )
        return len(self.graphs) - 1

    def _tensor(self, diff: GraphDiff, tensor: TensorDiff) -> dict[str, Any]:
        x, y = diff.a.model.params[tensor.name_a], diff.b.model.params[tensor.name_b]
        return {
            "a": tensor.name_a,
            "b": tensor.name_b,
            "relation": tensor.relation,
            "text": tensor_text(tensor),
            "histogram": self._histogram(x, None if tensor.relation == "equal" else y),
        }

    def _alone(self, diff: GraphDiff) -> Iterator[dict[str, Any]]:
        """The stored tensors that have no counterpart."""
        for side, name in ((diff.a, "a"), (diff.b, "b")):
            known = {getattr(tensor, f"name_{name}") for tensor in diff.tensors}
            for item in side.view.items:
                if item.kind == "tensor" and item.tensor not in known:
                    counts = self._histogram(side.model.params[item.tensor], None)
                    yield {name: item.tensor, "relation": "alone", "text": "", "histogram": counts}

    def _histogram(self, x: torch.Tensor, y: torch.Tensor | None) -> list[Any] | None:
        """Both ends of the range and the counts of one or two tensors, remembered."""
        # One is counted beside a number of its own, which leaves the range as it is.
        sides = x, x.detach().reshape(-1)[:1] if y is None else y
        key = tuple((side.data_ptr(), side.dtype, side.shape, side.stride()) for side in sides)
        if key not in self._counted:
            self._counted[key] = histogram(*sides)
            self._kept += sides  # so that no other tensor comes to stand at this address
        found = self._counted[key]
        return None if found is None else [found.low, found.high, found.a, None if y is None else found.b]


def _node(item: Item, macs: int | str | None) -> dict[str, Any]:
    """The fields that are not empty; attributes as text."""
    row = {
        "name": item.name,
        "kind": item.kind if item.kind != "call" else "",
        "operator": item.operator,
        "attributes": {name: value_text(value) for name, value in item.attributes.items()},
        "operands": [[slot, source] for slot, source in item.operands],
        "value": item.value,
        "path": item.path,
        "source": item.source,
        "tensor": item.tensor,
        "macs": macs,
    }
    return {name: value for name, value in row.items() if value or name == "name"}


def _entries(diff: GraphDiff, rows: Sequence[Row]) -> list[dict[str, Any]]:
    place = {("a", row.a): number for number, row in enumerate(rows)}
    place |= {("b", row.b): number for number, row in enumerate(rows)}
    views = {"a": diff.a.view, "b": diff.b.view}

    def found(side: str, index: int) -> list[int]:
        """The row of an item; those of its readers for a stored tensor."""
        own = place.get((side, index))
        readers = (place.get((side, user)) for _, user in views[side].users[index])
        return [own] if own is not None else [row for row in readers if row is not None]

    def entry_row(entry: Entry) -> dict[str, Any]:
        lit = {row for index in entry.a for row in found("a", index)} | {
            row for index in entry.b for row in found("b", index)
        }
        return {
            "kind": entry.kind,
            "title": entry.title,
            "path": entry.path,
            "passes": list(entry.passes),
            "rows": sorted(lit),
            "channels": list(entry.channels),
            "of": entry.of,
        }

    return [entry_row(entry) for entry in diff.entries]


def _numbers(diff: GraphDiff) -> dict[str, Any] | None:
    if diff.numbers is None:
        return None
    first = diff.numbers.first
    return {
        "first": first and first.a,
        "errors": [[row.a, _error(row.error), row.within] for row in diff.numbers.profile],
        "outputs": [_error(error) for error in diff.numbers.outputs],
    }


def _error(error: float | None) -> str:
    return "another shape" if error is None else "infinite" if math.isinf(error) else f"{error:.2g}"


def _size(size: Size | None) -> int | str | None:
    return size if size is None or isinstance(size, int) else str(size)
