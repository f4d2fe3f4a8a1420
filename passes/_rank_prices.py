"""What layers and their factors cost, in the unit of a budget, and which ranks are cheaper than the layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import product

import torch

from graphopt.analysis.cost import cost
from graphopt.analysis.widths import layer_macs
from graphopt.measure import LatencyTable, Stopwatch
from graphopt.model import Model
from graphopt.ops import Kind, lookup
from graphopt.passes._factor_forms import Form, Ranks
from graphopt.passes._factor_layers import Whole
from graphopt.passes._factor_writer import Aside
from graphopt.rewriter import Node, Rewriter

__all__ = ["Macs", "Params", "Price", "Seconds", "cheaper"]

aten = torch.ops.aten

_FREE = (aten.constant_pad_nd.default, aten.unflatten.int, aten.flatten.using_ints, aten.unsqueeze.default)
"""Calls that compute nothing: they are computed with what is beside them."""


class Price(ABC):
    """Costs in one unit.

    Attributes:
        unit: how it is called where a reason is given.
        whole: what the model costs.
    """

    unit: str
    whole: float

    def __init__(self, rw: Rewriter) -> None:
        self.rw = rw

    @abstractmethod
    def layer(self, whole: Whole) -> float:
        """Of a layer as it is."""

    def factors(self, whole: Whole, form: Form, ranks: Ranks) -> float:
        """Of its factors."""
        aside = Aside(self.rw, whole)
        form.write(aside, whole, form.empty(whole, ranks))
        return self._written(aside)

    @abstractmethod
    def _written(self, aside: Aside) -> float:
        """Of what was written aside."""

    def takes(self, ours: float, theirs: float) -> str:
        return f"would take {int(ours):,} instead of {int(theirs):,} {self.unit}"


class Params(Price):
    """Elements of parameters; those of buffers count as well, for a layer whose weight is one."""

    unit = "parameters"

    def __init__(self, rw: Rewriter) -> None:
        super().__init__(rw)
        self.whole = float(cost(rw.model).parameters)

    def layer(self, whole: Whole) -> float:
        return float(whole.kernel.weight.numel())

    def _written(self, aside: Aside) -> float:
        return float(aside.parameters)


class Macs(Price):
    """Multiply-accumulates, at the sizes of the example."""

    unit = "multiply-accumulates"

    def __init__(self, rw: Rewriter) -> None:
        super().__init__(rw)
        self._macs = layer_macs(rw.model)
        self.whole = sum(self._macs.values())

    def layer(self, whole: Whole) -> float:
        return self._macs.get(whole.node, 0.0)

    def _written(self, aside: Aside) -> float:
        return aside.macs


class Seconds(Price):
    """Measured seconds on a target, each layer compiled and timed alone."""

    unit = "microseconds"

    def __init__(self, rw: Rewriter, watch: Stopwatch) -> None:
        super().__init__(rw)
        self.watch, self.table = watch, LatencyTable(watch, rw.model.shapes)
        self._call = self.table.seconds(_next_to_nothing(rw))
        self.whole = sum(map(self._own, _layers(rw.model)))

    def layer(self, whole: Whole) -> float:
        return self._own(whole.node)

    def _written(self, aside: Aside) -> float:
        return sum(self._own(node) for node in aside.calls if node.target not in _FREE)

    def _own(self, node: Node) -> float:
        """Without what any call takes, so that two layers do not seem dearer than they are in one model."""
        return max(self.table.seconds(node) - self._call, 0.0)

    def takes(self, ours: float, theirs: float) -> str:
        on = self.watch.target.cpu or self.watch.target.arch
        return f"would take {ours * 1e6:,.1f} instead of {theirs * 1e6:,.1f} {self.unit} on {on}"


def _next_to_nothing(rw: Rewriter) -> Node:
    """A call of one element."""
    graph = type(rw.graph)()
    source = graph.placeholder("x")
    source.meta["val"] = torch.empty(1, device="meta")
    node = graph.call_function(aten.relu.default, (source,))
    node.meta["val"] = torch.empty(1, device="meta")
    return node


def _layers(model: Model) -> Iterator[Node]:
    for node in model.graph.nodes:
        info = lookup(node.target) if node.op == "call_function" else None
        known = info is not None and info.kind in (Kind.CONTRACTION, Kind.ATTENTION)
        if known or node.target is aten.embedding.default:
            yield node


def cheaper(price: Price, whole: Whole, form: Form, step: int, count: int) -> list[Ranks]:
    """Up to `count` ranks of a form that cost less than the layer, from few to many; multiples of `step`.

    Costs rise with ranks, so the largest one that is cheaper is found by bisection. Forms with several ranks take a
    grid.
    """
    full, limit = form.full(whole), price.layer(whole)
    if len(full) > 1:
        parts = sorted({*((i + 1) / (_GRID + 1) for i in range(_GRID))})
        sides = [sorted({_rounded(part * size, step) for part in parts}) for size in full]
        pairs = product(*sides)
        return [r for r in pairs if all(map(int.__le__, r, full)) and price.factors(whole, form, r) < limit]
    low, high = 0, full[0] // step  # in steps; low is cheaper, or none
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if price.factors(whole, form, (middle * step,)) < limit else (low, middle - 1)
    # Ranks lie closer where there are few: what one more of them gains falls.
    return [(step * s,) for s in sorted({max(1, round(low * (i / count) ** 1.5)) for i in range(1, count + 1)}) if low]


_GRID = 4


def _rounded(number: float, step: int) -> int:
    return max(step, round(number / step) * step)
