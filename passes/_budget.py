"""What pruning may leave: a part of what can be counted, or of the seconds of compiled code."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping

from graphopt.analysis.cost import cost
from graphopt.analysis.coupling import Coupling
from graphopt.analysis.widths import Widths, example_cost, layer_macs
from graphopt.deployed import Deployed
from graphopt.measure import LatencyTable, Stopwatch
from graphopt.model import Model
from graphopt.ops import Kind, lookup
from graphopt.params import ParamKind
from graphopt.passes._half_width import saveable
from graphopt.rewriter import Node

__all__ = ["Budget", "Latency", "Macs", "Memory", "Params"]


class Budget(ABC):
    """A part of a model's cost that is to be left.

    Attributes:
        part: between 0 and 1.
        before: the cost of the model as it was at first, in the unit of `reached`.
        widths: what the cost is thought to be made of, to plan with; in a unit of its own.
        whole: the cost of the model as it was at first, in the unit of `widths`.
        original: the model as it was at first.
        amounts: what single calls, or stored tensors, are thought to cost, in the unit of `widths`.
        enough: a plan is good enough when it reaches this part of the budget.
        step: of which the widths that stay are multiples, unless the user says otherwise.
    """

    name: str
    enough = 0.98
    step = 1
    before: float
    widths: Widths
    original: Model
    whole = 0.0
    amounts: Mapping[Node, float]

    def __init__(self, part: float) -> None:
        self.part = part

    def start(self, coupling: Coupling) -> None:
        """Look at the model to plan for: first at the one of which a part is to be left, later at the same without some
        branches."""
        first = not self.whole
        self.look(coupling, first=first)
        if first:
            self.whole, self.original = self.widths.total, coupling.model

    @abstractmethod
    def look(self, coupling: Coupling, *, first: bool) -> None:
        """Set `widths` and `amounts`, and for the first model `before`."""

    @abstractmethod
    def reached(self, model: Model) -> float:
        """The cost of a model that was cut."""


class Macs(Budget):
    """Multiply-accumulates, at the sizes of the example."""

    name = "macs"

    def look(self, coupling: Coupling, *, first: bool) -> None:
        self.amounts = layer_macs(coupling.model)
        self.widths = Widths.of_layers(coupling, self.amounts)
        if first:
            self.before = self.widths.total

    def reached(self, model: Model) -> float:
        return sum(layer_macs(model).values())


class Params(Budget):
    """Elements of the parameters, tied ones once."""

    name = "params"

    def look(self, coupling: Coupling, *, first: bool) -> None:
        self.amounts, self.widths = _parameter_sizes(coupling.model), Widths.of_params(coupling)
        if first:
            self.before = self.reached(coupling.model)

    def reached(self, model: Model) -> float:
        return float(cost(model).parameters)


class Memory(Budget):
    """Bytes of the weights and of the activations that are alive at once, at the sizes of the example."""

    name = "memory"

    def look(self, coupling: Coupling, *, first: bool) -> None:
        model = coupling.model
        counts = _parameter_sizes(model)
        self.amounts = {node: n * model.params[str(node.target)].element_size() for node, n in counts.items()}
        self.widths = Widths.of_bytes(coupling)
        if first:
            self.before = self.reached(model)

    def reached(self, model: Model) -> float:
        counted = example_cost(model)
        return float(counted.weight_bytes) + float(counted.peak_bytes)


class Latency(Budget):
    """Seconds of compiled code on a target. The plan goes by what each layer takes alone, as it is and at half its
    width, and what a plan reaches is measured on the whole (see `graphopt.deployed`)."""

    name = "latency"
    enough = 0.96
    before = 1.0

    def __init__(self, part: float, watch: Stopwatch) -> None:
        super().__init__(part)
        self.watch = watch
        self.step = max(1, watch.target.vector_bits // 32)

    def look(self, coupling: Coupling, *, first: bool) -> None:
        model = coupling.model
        if first:
            self.table = LatencyTable(self.watch, model.shapes)
            self._deployed = Deployed(model, self.watch)
        layers = [node for node in model.graph.nodes if _is_layer(node)]
        self.amounts = {node: saveable(self.table, node, self.step) for node in layers}
        self.widths = Widths.of_layers(coupling, self.amounts)

    def reached(self, model: Model) -> float:
        return self._deployed.part(model)


def _parameter_sizes(model: Model) -> dict[Node, float]:
    """Elements of every parameter that the graph reads; of tied ones each name has its share."""
    readers = [node for node in model.graph.nodes if node.op == "get_attr"]
    stored = [(node, model.params[str(node.target)]) for node in readers]
    names = Counter(id(tensor) for _, tensor in stored)
    return {
        node: tensor.numel() / names[id(tensor)]
        for node, tensor in stored
        if model.params.kind(str(node.target)) is ParamKind.PARAMETER
    }


def _is_layer(node: object) -> bool:
    info = lookup(getattr(node, "target", None))
    return info is not None and info.kind in (Kind.CONTRACTION, Kind.ATTENTION)
