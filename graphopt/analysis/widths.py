"""How the cost of a model follows from what is removed: amounts of layers, and parameters, as products of widths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.fx import Node

from graphopt.analysis.cost import Cost, cost
from graphopt.analysis.labels import compact
from graphopt.analysis.lifetimes import peak_step
from graphopt.export import usual_sizes
from graphopt.ops import Contracted, Product, argument, lookup, operands
from graphopt.params import Entry, ParamKind

if TYPE_CHECKING:
    from graphopt.analysis.coupling import Coupling, Family
    from graphopt.model import Model

__all__ = ["Term", "Widths", "layer_macs"]


@dataclass(frozen=True)
class Term:
    """An amount that shrinks with the part of the positions that is left along each of some axes."""

    amount: float
    axes: tuple[np.ndarray, ...]


class Widths:
    """The cost of the model of a coupling with classes removed, without cutting it.

    A layer's cost is its amount times the part that is left of its inputs times that of its outputs. What a unit saves
    depends on what else is removed; `savings` shares what is saved twice: 1 - a b = (1-a)(1+b)/2 + (1-b)(1+a)/2.
    """

    def __init__(self, coupling: Coupling, terms: Iterable[Term]) -> None:
        self.coupling = coupling
        self._terms = list(terms)
        self.total = sum(term.amount for term in self._terms)

    @classmethod
    def of_layers(cls, coupling: Coupling, amounts: Mapping[Node, float]) -> Widths:
        """Of what is counted or measured for each layer, such as `layer_macs`."""
        return cls(coupling, _layer_terms(coupling, amounts))

    @classmethod
    def of_params(cls, coupling: Coupling) -> Widths:
        return cls(coupling, _parameter_terms(coupling))

    @classmethod
    def of_bytes(cls, coupling: Coupling) -> Widths:
        """Of the stored tensors, and of the activations that are alive where the most are."""
        return cls(coupling, [*_stored_terms(coupling), *_live_terms(coupling)])

    def cost(self, removed: Iterable[int]) -> float:
        """What is left of the total when classes are removed."""
        gone = self._gone(removed)
        return sum(term.amount * prod(1 - float(gone[axis].mean()) for axis in term.axes) for term in self._terms)

    def savings(self, family: Family, removed: Iterable[int]) -> np.ndarray:
        """What each unit of a family saves, if `removed` is about what will be removed in all; [units]."""
        gone = self._gone(removed)
        table = np.full(self.coupling.classes.count + 1, -1)
        for index, unit in enumerate(family):
            table[list(unit)] = index
        saved = np.zeros(len(family))
        for term in self._terms:
            left = [1 - float(gone[axis].mean()) for axis in term.axes]
            for place, axis in enumerate(term.axes):
                units = table[axis]
                mine = units[units >= 0]
                if mine.size:
                    others = prod((1 + share) / 2 for other, share in enumerate(left) if other != place)
                    saved += np.bincount(mine, minlength=len(family)) * (term.amount * others / axis.size)
        return saved

    def _gone(self, removed: Iterable[int]) -> np.ndarray:
        gone = np.zeros(self.coupling.classes.count + 1, dtype=bool)
        gone[list(removed)] = True
        gone[-1] = False
        return gone


def example_cost(model: Model) -> Cost:
    """What a call costs at the sizes of the example."""
    counted = cost(model)
    sizes = usual_sizes(model)
    return counted.at(**{name: sizes[name] for name in counted.names}) if counted.names else counted


def layer_macs(model: Model) -> dict[Node, float]:
    """Multiply-accumulates of every call that has any, at the sizes of the example."""
    macs = {row.name: row.macs for row in example_cost(model).nodes}
    return {node: float(number) for node in model.graph.nodes if (number := macs.get(node.name))}


def _layer_terms(coupling: Coupling, amounts: Mapping[Node, float]) -> Iterator[Term]:
    slots: dict[Node, list[np.ndarray]] = {}
    for slot in coupling.trace.slots:
        # A bias does not multiply; of a grouped layer the wide axis of the weight counts groups already.
        if slot.labels.dim() == 1 and slot.tensor.meta["val"].dim() > 1 and _is_layer(slot.user):
            slots.setdefault(slot.user, []).append(coupling.of(slot.labels).numpy().ravel())
    for node, amount in amounts.items():
        read = [coupling.trace.of(used) for used in _operands(node)[:1]] if node not in slots else []
        yield Term(amount, tuple(slots.get(node) or [coupling.of(labels).numpy().ravel() for labels in read]))


def _parameter_terms(coupling: Coupling) -> Iterator[Term]:
    for entry, axes in _stored(coupling):
        if entry.kind is ParamKind.PARAMETER and entry.name not in coupling.model.kept:
            yield Term(float(entry.tensor.numel()), axes)


def _stored_terms(coupling: Coupling) -> Iterator[Term]:
    for entry, axes in _stored(coupling):
        if entry.name not in coupling.model.kept:
            yield Term(float(entry.tensor.numel() * entry.tensor.element_size()), axes)


def _stored(coupling: Coupling) -> Iterator[tuple[Entry, tuple[np.ndarray, ...]]]:
    """Every stored tensor once, and the classes along its axes."""
    model = coupling.model
    axes: dict[int, dict[int, np.ndarray]] = {}
    for slot, classes in coupling.slot_classes:
        tensor = model.params[str(slot.tensor.target)]
        axes.setdefault(id(tensor), {}).setdefault(slot.axis, classes.ravel())
    seen: set[int] = set()
    for entry in model.params.entries():
        if id(entry.tensor) not in seen:
            seen.add(id(entry.tensor))
            yield entry, tuple(axes.get(id(entry.tensor), {}).values())


def _live_terms(coupling: Coupling) -> Iterator[Term]:
    """The activations that are alive at the step at which they take the most bytes."""
    buffers = example_cost(coupling.model).buffers
    step = peak_step(buffers, int)
    named = {node.name: node for node in coupling.model.graph.nodes}
    for buffer in buffers:
        if buffer.first <= step <= buffer.last:
            labels = coupling.trace.labels.get(named[buffer.name])
            axes = (compact(coupling.of(labels)).numpy().ravel(),) if isinstance(labels, torch.Tensor) else ()
            yield Term(float(buffer.bytes), axes)


def _is_layer(node: Node) -> bool:
    info = lookup(node.target)
    return info is not None and isinstance(info.axes, Contracted | Product)


def _operands(node: Node) -> list[Node]:
    """The activations that a product multiplies, the first of which stands for all; a stored tensor has no labels."""
    info = lookup(node.target)
    found: list[Node] = []
    if info is not None and isinstance(info.axes, Product):
        found = list(operands(node))
    elif info is not None and isinstance(info.axes, Contracted):
        found = [argument(node, info.axes.input)]
    return [used for used in found if used.op != "get_attr"]
