"""The result of a comparison, and its forms as JSON and as a line of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graphopt.diff.costs import CostDiff
from graphopt.diff.entries import KINDS, Entry, Pair
from graphopt.diff.latency import LatencyDiff
from graphopt.diff.numbers import NumbersDiff
from graphopt.diff.tensors import TensorDiff
from graphopt.diff.view import Item, View
from graphopt.model import Model

__all__ = ["SCHEMA", "GraphDiff", "Side"]

SCHEMA = 1
"""Version of the JSON form; docs/diff.md describes it."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two models: what it was called, and its rows, which hold the model itself."""

    source: str
    view: View

    @property
    def model(self) -> Model:
        return self.view.model

    def to_json(self, *, graph: bool) -> dict[str, Any]:
        model = self.model
        rows: dict[str, Any] = {
            "source": self.source,
            "signature": str(model.signature),
            "mode": model.mode,
            "history": list(model.history),
            "names": {str(item.index): item.name for item in self.view.items},
        }
        if graph:
            rows["nodes"] = [_node(item) for item in self.view.items]
        return rows


@dataclass(frozen=True, slots=True)
class GraphDiff:
    """What differs between two models.

    Attributes:
        a, b: the two sides. Items are counted from 0 in the order of their graphs; entries and pairs name them so.
        entries: the differences, in the order of the first graph.
        pairs: every matched pair with all that changed in it, consequences of changes elsewhere included.
        tensors: every two stored tensors that belong together, equal ones included.
        cost: multiply-accumulates, parameters, bytes and node counts of both; None when it was not asked for.
        numbers: what running both has shown, if they were run.
        latency: measured times, if they were measured.
        ignored: how many differences were left out on request.
        tolerance: the relative difference up to which numbers count as equal.
    """

    a: Side
    b: Side
    entries: tuple[Entry, ...]
    pairs: tuple[Pair, ...]
    tensors: tuple[TensorDiff, ...]
    cost: CostDiff | None = None
    numbers: NumbersDiff | None = None
    latency: LatencyDiff | None = None
    ignored: int = 0
    tolerance: float = 0.0

    @property
    def same(self) -> bool:
        """Whether there is no difference: no entry, and, if both were run, no error beyond the tolerance."""
        return not self.entries and (self.numbers is None or self.numbers.first is None)

    def __bool__(self) -> bool:
        """True where something differs."""
        return not self.same

    def counts(self) -> dict[str, int]:
        """How many entries there are of each kind, kinds without any left out."""
        found = Counter(entry.kind for entry in self.entries)
        return {kind: found[kind] for kind in KINDS if found[kind]}

    def relations(self) -> dict[str, int]:
        """How many tensors stand in each relation."""
        return dict(Counter(tensor.relation for tensor in self.tensors).most_common())

    def partner(self) -> Mapping[int, int]:
        """The item of `b` for every item of `a` that has one; stored tensors are not in it."""
        return {pair.a: pair.b for pair in self.pairs}

    def matched(self) -> int:
        """How many calls of the first model have a partner."""
        return sum(self.a.view.items[pair.a].kind == "call" for pair in self.pairs)

    def summary(self) -> str:
        """One line: `2 rewritten, 1 changed; 70 of 71 calls matched; 60 of 62 tensors equal`."""
        if self.same:
            head = "no differences"
        else:
            head = ", ".join(f"{count} {kind}" for kind, count in self.counts().items()) or "equal graphs"
        calls = sum(1 for _ in self.a.view.calls())
        equal = sum(tensor.relation == "equal" for tensor in self.tensors)
        parts = [head, f"{self.matched()} of {calls} calls matched", f"{equal} of {len(self.tensors)} tensors equal"]
        if self.ignored:
            parts.append(f"{self.ignored} ignored")
        if self.numbers is not None and self.numbers.first is not None:
            parts.append(f"numbers part at '{self.a.view.items[self.numbers.first.a].name}'")
        return "; ".join(parts)

    def to_json(self, *, graph: bool = False) -> dict[str, Any]:
        """Plain data in the schema that docs/diff.md describes.

        Args:
            graph: hold the nodes of both graphs too, with attributes, operands, shapes and source lines.
        """
        return {
            "schema": SCHEMA,
            "same": self.same,
            "summary": self.summary(),
            "tolerance": self.tolerance,
            "ignored": self.ignored,
            "a": self.a.to_json(graph=graph),
            "b": self.b.to_json(graph=graph),
            "counts": self.counts(),
            "entries": [entry.to_json() for entry in self.entries],
            "pairs": [pair.to_json() for pair in self.pairs],
            "weights": {
                "relations": self.relations(),
                "tensors": [tensor.to_json() for tensor in self.tensors if tensor.relation != "equal"],
            },
            "cost": self.cost and self.cost.to_json(),
            "numbers": self.numbers and self.numbers.to_json(),
            "latency": self.latency and self.latency.to_json(),
        }

    def to_html(self) -> str:
        """One page that shows both graphs side by side and needs nothing else; docs/diff.md says what it does.

        Raises:
            UsageError: when the layout library of the page was not fetched (`make page` in a checkout).
        """
        from graphopt.diff.html import html_page
        from graphopt.diff.page_data import PageData

        data = PageData(f"{self.a.source or 'a model'} and {self.b.source or 'a model'}")
        data.step("", data.compare(self))
        return html_page(data.to_json())

    def __repr__(self) -> str:
        return f"<graphopt.GraphDiff: {self.summary()}>"


def _node(item: Item) -> dict[str, Any]:
    return {
        "kind": item.kind,
        "name": item.name,
        "operator": item.operator,
        "attributes": {name: _plain(value) for name, value in item.attributes.items()},
        "operands": [[slot, source] for slot, source in item.operands],
        "value": item.value,
        "path": item.path,
        "source": item.source,
        "tensor": item.tensor,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return value
