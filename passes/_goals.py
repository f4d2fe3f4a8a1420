"""The part of what a model costs that may be left, for passes that take whole blocks away."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

from graphopt.analysis.cost import cost
from graphopt.analysis.widths import layer_macs
from graphopt.deployed import Deployed
from graphopt.errors import UsageError
from graphopt.measure import LatencyTable, Stopwatch
from graphopt.model import Model
from graphopt.ops import Kind, lookup
from graphopt.rewriter import Node

__all__ = ["COUNTED", "Goal", "Part", "PartOfLatency"]


class Goal(ABC):
    """A part of what a model costs that may be left.

    Attributes:
        name: what is counted.
        part: between 0 and 1.
        exact: whether costs are counted, not measured, so that looking again is cheap.
    """

    name: str
    part: float
    exact = True

    @abstractmethod
    def left(self, model: Model) -> float:
        """The part of the cost that a shorter model has."""

    @abstractmethod
    def saved(self, shorter: Model, nodes: Iterable[Node]) -> float:
        """The part of the cost that is saved without some nodes of the model, which `shorter` is without."""


class Part(Goal):
    """A part of something that is counted."""

    def __init__(self, name: str, part: float, model: Model) -> None:
        self.name, self.part, self.count = name, part, COUNTED[name]
        self.whole = self.count(model)
        if not self.whole:
            raise UsageError(f"the model has no {name}, so that no part of them can go", todo="give count=")

    def left(self, model: Model) -> float:
        return self.count(model) / self.whole

    def saved(self, shorter: Model, nodes: Iterable[Node]) -> float:
        return 1 - self.left(shorter)


class PartOfLatency(Goal):
    """A part of the seconds of compiled code on a target. What a block takes is estimated from what its layers take
    alone; what is left is measured on the whole (see `graphopt.deployed`)."""

    name = "latency"
    exact = False

    def __init__(self, part: float, model: Model, watch: Stopwatch) -> None:
        self.part, self.deployed = part, Deployed(model, watch)
        table = LatencyTable(watch, model.shapes)
        self.seconds = {node: table.seconds(node) for node in model.graph.nodes if _is_layer(node)}
        self.whole = sum(self.seconds.values())

    def left(self, model: Model) -> float:
        return self.deployed.part(model)

    def saved(self, shorter: Model, nodes: Iterable[Node]) -> float:
        return sum(self.seconds.get(node, 0.0) for node in nodes) / (self.whole or 1.0)


def _macs(model: Model) -> float:
    return sum(layer_macs(model).values())


def _parameters(model: Model) -> float:
    return float(cost(model).parameters)


COUNTED: dict[str, Callable[[Model], float]] = {"macs": _macs, "params": _parameters}


def _is_layer(node: Node) -> bool:
    info = lookup(node.target) if node.op == "call_function" else None
    return info is not None and info.kind in (Kind.CONTRACTION, Kind.ATTENTION)
