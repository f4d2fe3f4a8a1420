"""What pruning may leave: a part of what can be counted, or of the seconds of compiled code."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from graphopt.analysis.cost import cost
from graphopt.analysis.coupling import Coupling
from graphopt.analysis.widths import Widths, layer_macs
from graphopt.measure import LatencyTable, Stopwatch
from graphopt.model import Model
from graphopt.ops import Kind, lookup
from graphopt.sample import sample_inputs

__all__ = ["Budget", "Latency", "Macs", "Params"]


class Budget(ABC):
    """A part of a model's cost that is to be left.

    Attributes:
        part: between 0 and 1.
        before: the cost of the model as it is, in the unit of `reached`.
        widths: what the cost is thought to be made of, to plan with; in a unit of its own.
        enough: a plan is good enough when it reaches this part of the budget.
        step: of which the widths that stay are multiples, unless the user says otherwise.
    """

    name: str
    enough = 0.0
    step = 1
    before: float
    widths: Widths

    def __init__(self, part: float) -> None:
        self.part = part

    @abstractmethod
    def start(self, coupling: Coupling) -> None:
        """Look at the model."""

    @abstractmethod
    def reached(self, model: Model) -> float:
        """The cost of a model that was cut."""


class Macs(Budget):
    """Multiply-accumulates, at the sizes of the example."""

    name = "macs"

    def start(self, coupling: Coupling) -> None:
        amounts = layer_macs(coupling.model)
        self.before, self.widths = sum(amounts.values()), Widths.of_layers(coupling, amounts)

    def reached(self, model: Model) -> float:
        return sum(layer_macs(model).values())


class Params(Budget):
    """Elements of the parameters, tied ones once."""

    name = "params"

    def start(self, coupling: Coupling) -> None:
        self.before, self.widths = float(cost(coupling.model).parameters), Widths.of_params(coupling)

    def reached(self, model: Model) -> float:
        return float(cost(model).parameters)


class Latency(Budget):
    """Seconds of compiled code on a target. The plan goes by what each layer takes alone; what a plan reaches is
    measured on the compiled model, which takes turns with the compiled original."""

    name = "latency"
    enough = 0.93
    before = 1.0

    def __init__(self, part: float, watch: Stopwatch, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__(part)
        self.watch, self.inputs = watch, list(inputs)
        self.step = max(1, watch.target.vector_bits // 32)

    def start(self, coupling: Coupling) -> None:
        model = coupling.model
        self.inputs = self.inputs or sample_inputs(model)
        self.table = LatencyTable(self.watch)
        layers = [node for node in model.graph.nodes if _is_layer(node)]
        self.widths = Widths.of_layers(coupling, {node: self.table.seconds(node) for node in layers})
        self._original = self.watch.build(model)

    def reached(self, model: Model) -> float:
        return self.watch.ratio(self.watch.build(model), self._original, self.inputs)


def _is_layer(node: object) -> bool:
    info = lookup(getattr(node, "target", None))
    return info is not None and info.kind in (Kind.CONTRACTION, Kind.ATTENTION)
