"""What mixtures of experts have in common, however they are written: tensors, a router, statistics, hidden units."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import map_arg

from graphopt.analysis.observe import observe
from graphopt.check import relative_error, tolerance
from graphopt.model import Model
from graphopt.ops import Kind, lookup
from graphopt.params import ParamKind
from graphopt.passes._experts import Aligned, Hidden, hidden_candidates
from graphopt.precision import full_precision
from graphopt.rewriter import Node, Rewriter
from graphopt.transform import Contract

__all__ = [
    "Mixture",
    "Statistics",
    "common_module",
    "evaluate",
    "find_hidden",
    "observe_routing",
    "router_of",
    "why_fixed",
]

_FAR = 48
"""How many calls behind the gates the router's layer is looked for."""
_MATTERS = 1e-3
"""How much moving the hidden units of one side alone has to change for the check of both sides to mean something."""


class Mixture(ABC):
    """A layer of experts.

    Attributes:
        name: the module that the experts are in.
        count: the number of experts.
        logits: the values of the router, [..., experts].
        routed: what says how much each expert is used.
        cone: the calls that make `ends` from the experts' tensors and from values of the model, in order.
        ends: what the experts make, before their results are weighted.
        at: a node to name it by in a report.
    """

    name: str
    count: int
    logits: Node
    routed: Node
    cone: list[Node]
    ends: list[Node]
    at: Node

    @abstractmethod
    def experts(self, model: Model) -> list[list[Tensor]]:
        """The tensors of every expert, in the order in which they are read."""

    @abstractmethod
    def uses(self, routed: Tensor) -> Tensor:
        """How much each expert is used, [experts], in a value of `routed`."""

    @abstractmethod
    def with_experts(self, model: Model, experts: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
        """New values of the model's tensors that give every expert other tensors."""

    @abstractmethod
    def merge(self, rw: Rewriter, aligned: Aligned) -> None:
        """Let one expert stand for each group."""


class Statistics:
    """How much the experts are used and how alike their router logits are, over all batches.

    Attributes:
        usage: [experts].
        gram: sums of products of logits, [experts, experts].
    """

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self.usage = torch.zeros(mixture.count, dtype=torch.float64)
        self.gram = torch.zeros(mixture.count, mixture.count, dtype=torch.float64)

    def see_logits(self, logits: Tensor) -> None:
        rows = logits.double().reshape(-1, self.mixture.count).cpu()
        self.gram += rows.t() @ rows

    def see_routed(self, routed: Tensor) -> None:
        self.usage += self.mixture.uses(routed).double().cpu()

    @property
    def similarity(self) -> Tensor:
        """Cosines of the logits, [experts, experts]; 0 where an expert has none but zeros."""
        sizes = self.gram.diagonal().sqrt()
        scale = sizes[:, None] * sizes
        return torch.where(scale > 0, self.gram / scale.where(scale > 0, 1.0), 0.0)


def observe_routing(rw: Rewriter, mixtures: Sequence[Mixture]) -> list[Statistics]:
    """One run over the calibration data, of which nothing but sums is kept."""
    found = [Statistics(mixture) for mixture in mixtures]
    watch: dict[Node, list[Any]] = {}
    for statistics in found:
        watch.setdefault(statistics.mixture.logits, []).append(statistics.see_logits)
        watch.setdefault(statistics.mixture.routed, []).append(statistics.see_routed)

    def shown(node: Node) -> Any:
        return lambda value: [see(value) for see in watch[node]]

    observe(rw.model, rw.calib, {node: shown(node) for node in watch})
    return found


def find_hidden(rw: Rewriter, mixture: Mixture) -> Hidden | None:
    """Where the hidden units of the experts are: where all experts compute the same on the first batch with their units
    in another order, and something else with that order on one side only. None where that is nowhere."""
    experts = mixture.experts(rw.model)
    values = _leaves(rw, mixture)
    reference = evaluate(mixture, values, {})
    generator = torch.Generator().manual_seed(0)
    limit = tolerance(Contract.EXACT, reference.dtype)
    for hidden in hidden_candidates(experts[0]):
        orders = [_moved(hidden.units, generator) for _ in experts]
        both = [hidden.permuted(expert, order) for expert, order in zip(experts, orders, strict=True)]
        last = max(place for place, axis in enumerate(hidden.axes) if axis is not None)
        half = [[*moved[:last], *expert[last:]] for moved, expert in zip(both, experts, strict=True)]
        errors = [
            relative_error(evaluate(mixture, values, mixture.with_experts(rw.model, made)), reference)
            for made in (both, half)
        ]
        if errors[0] <= limit and errors[1] > max(_MATTERS, 4 * limit):
            return hidden
    return None


def _moved(count: int, generator: torch.Generator) -> Tensor:
    """Some order but the one that is there."""
    order = torch.randperm(count, generator=generator)
    return order.roll(1) if torch.equal(order, torch.arange(count)) else order


def _leaves(rw: Rewriter, mixture: Mixture) -> dict[Node, Any]:
    """What the calls of the cone read that is not of it, on the first batch."""
    inside = set(mixture.cone)
    read = {used for node in mixture.cone for used in node.all_input_nodes if used not in inside}
    values: dict[Node, Any] = {}

    def keep(node: Node) -> Any:
        return lambda value: values.__setitem__(node, value)

    observe(rw.model, rw.calib[:1], {node: keep(node) for node in read})
    return values


def evaluate(mixture: Mixture, values: dict[Node, Any], tensors: dict[str, Tensor]) -> Tensor:
    """What the experts make of the values that they read, with other tensors under some names; [numbers]."""
    made: dict[Node, Any] = {
        node: tensors.get(str(node.target), value) if node.op == "get_attr" else value for node, value in values.items()
    }
    with torch.no_grad(), full_precision():
        for node in mixture.cone:
            args, kwargs = map_arg((node.args, node.kwargs), made.__getitem__)
            assert callable(node.target)
            made[node] = node.target(*args, **kwargs)
    return torch.cat([made[end].flatten() for end in mixture.ends])


def router_of(node: Node, experts: int) -> Node | None:
    """The nearest layer before a value that has as many outputs as there are experts."""
    waiting, seen = [node], 0
    while waiting and seen < _FAR:
        one, seen = waiting.pop(0), seen + 1
        info = lookup(one.target) if one.op == "call_function" else None
        value = one.meta.get("val")
        if info is not None and info.kind is Kind.CONTRACTION:
            if isinstance(value, Tensor) and value.shape[-1] == experts:
                return one
            continue
        waiting += [used for used in one.all_input_nodes if used.op == "call_function"]
    return None


def why_fixed(rw: Rewriter, node: Node, user: Node) -> str | None:
    """Why the tensor at a node may not get another value."""
    name = str(node.target)
    if rw.params.kind(name) is not ParamKind.PARAMETER:
        return f"'{name}' is no parameter"
    if not rw.params[name].is_floating_point():
        return f"'{name}' holds integers"
    if any(alias in rw.params.masks for alias in rw.params.aliases(name)):
        return f"the mask of '{name}' keeps elements zero"
    return rw.why_shared(node, user)


def common_module(names: Sequence[str]) -> str:
    """The module that all of some tensors are in."""
    common = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
