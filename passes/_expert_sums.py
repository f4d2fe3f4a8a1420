"""Mixtures of which every expert is computed: sums of g[..., e] * f_e(x), found by the columns of the gates g."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.model import Model
from graphopt.ops import Kind, argument, arguments, is_pure, lookup, shape
from graphopt.passes._experts import Aligned
from graphopt.passes._mixtures import Mixture, common_module, router_of, why_fixed
from graphopt.rewriter import Node, Rewriter

__all__ = ["WeightedSum", "weighted_sums"]

aten = torch.ops.aten
_PIECES = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)
_MOST_PARTS = 500
_RESHAPES = (aten.unsqueeze.default, aten.view.default, aten.reshape.default)


class _Refused(Exception):
    """Why something is no mixture."""


class WeightedSum(Mixture):
    """A sum of experts' results times columns of the gates.

    `terms` are, for each expert, the product, the factor made of a column, and what the expert makes; `tensors` the
    stored tensors of each, in the order in which they are read.
    """

    def __init__(self, rw: Rewriter, gates: Node, terms: dict[int, tuple[Node, Node, Node]]) -> None:
        self.routed, self.count = gates, len(terms)
        self.logits = router_of(gates, self.count) or gates
        self.terms = [terms[expert] for expert in range(self.count)]
        self.at, self.ends = self.terms[0][0], [made for _, _, made in self.terms]
        self.place = {node: place for place, node in enumerate(rw.graph.nodes)}
        for term, gate, _ in self.terms:
            _next_sum(term)
            if shape(gate) != shape(self.terms[0][1]):
                raise _Refused(f"its gates '{self.terms[0][1].name}' and '{gate.name}' differ in shape")
        pairs = [_twins(self.ends[0], end, expert) for expert, end in enumerate(self.ends) if expert]
        experts = [list(pairs[0]), *(list(found.values()) for found in pairs)]
        self.cone = sorted((one for nodes in experts for one in nodes if _is_call(one)), key=self.place.__getitem__)
        first = sorted((one for one in experts[0] if not _is_call(one)), key=self._read)
        self.tensors = [first, *([found.get(one, one) for one in first] for found in pairs)]
        for nodes, (term, _, _) in zip(experts, self.terms, strict=True):
            _check_own(rw, set(nodes), term)
        if not first:
            raise _Refused("its experts have no weights of their own")
        self.name = common_module([str(node.target) for one in self.tensors for node in one]) or self.at.name

    def _read(self, tensor: Node) -> tuple[int, int]:
        """When a tensor is read first, and as which argument."""
        user = min(tensor.users, key=self.place.__getitem__)
        return self.place[user], user.all_input_nodes.index(tensor)

    def experts(self, model: Model) -> list[list[Tensor]]:
        return [[model.params[str(node.target)].detach() for node in tensors] for tensors in self.tensors]

    def uses(self, routed: Tensor) -> Tensor:
        return routed.double().abs().reshape(-1, self.count).sum(0)

    def with_experts(self, model: Model, experts: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
        return {
            str(node.target): tensor
            for nodes, tensors in zip(self.tensors, experts, strict=True)
            for node, tensor in zip(nodes, tensors, strict=True)
        }

    def merge(self, rw: Rewriter, aligned: Aligned) -> None:
        """The last of a group stands for it: the gates of the others come before its own product."""
        for group, tensors in zip(aligned.groups, aligned.merged, strict=True):
            *others, stays = sorted(group, key=lambda expert: self.place[self.terms[expert][0]])
            term, gate, _ = self.terms[stays]
            if not others:
                continue
            why = f"experts {', '.join(map(str, sorted(group)))} of '{self.name}' are one"
            total = gate
            for other in others:
                total = rw.call(aten.add.Tensor, total, self.terms[other][1], before=term)
            rw.replace_input(term, gate, total, why)
            for node, tensor in zip(self.tensors[stays], tensors, strict=True):
                rw.set_tensor(node, tensor, why)
            for other in others:
                total, addend = _next_sum(self.terms[other][0])
                rw.replace(total, addend, why)


def weighted_sums(rw: Rewriter) -> Iterator[WeightedSum]:
    """The mixtures of a model that are sums of all experts; what looks like one and is none is skipped."""
    for gates, terms in _terms(rw).items():
        at = next(iter(terms.values()))[0][0]
        try:
            doubled = [expert for expert, found in terms.items() if len(found) > 1]
            if doubled:
                raise _Refused(f"column {doubled[0]} of '{gates.name}' is multiplied with several values")
            missing = set(range(int(shape(gates)[-1]))) - terms.keys()
            if missing:
                raise _Refused(f"column {min(missing)} of '{gates.name}' is used otherwise")
            yield WeightedSum(rw, gates, {expert: found[0] for expert, found in terms.items()})
        except _Refused as refused:
            rw.skip(at, f"no mixture of experts: {refused}")
    for node in rw.find(aten.stack.default):
        if _are_twins(argument(node, "tensors")):
            why = (
                "results of layers that are built alike are stacked; if they are experts, add up g[..., e] * expert(x)"
            )
            rw.skip(node, f"no mixture of experts that is understood: {why}")


def _are_twins(made: Sequence[Node]) -> bool:
    if len(made) < 2 or not all(_has_layer(node) for node in made):
        return False
    try:
        return all(_twins(made[0], other, expert) for expert, other in enumerate(made) if expert)
    except _Refused:
        return False


def _terms(rw: Rewriter) -> dict[Node, dict[int, list[tuple[Node, Node, Node]]]]:
    """For each tensor of gates, by column: the product, the factor that is made of the column, and the other one. Only
    tensors of which two or more columns are multiplied with something that has weights."""
    found: dict[Node, dict[int, list[tuple[Node, Node, Node]]]] = {}
    for node in rw.find(aten.mul.Tensor):
        factors = (argument(node, "self"), argument(node, "other"))
        for gate, made in (factors, factors[::-1]):
            column = _column(gate) if isinstance(gate, Node) and isinstance(made, Node) else None
            if column is not None:
                gates, expert = column
                found.setdefault(gates, {}).setdefault(expert, []).append((node, gate, made))
                break
    return {
        gates: terms
        for gates, terms in found.items()
        if len(terms) > 1 and all(_has_layer(made) for rows in terms.values() for _, _, made in rows)
    }


def _column(node: Node) -> tuple[Node, int] | None:
    """The tensor and the column of its last axis that a value is, with axes of size one more or less."""
    while node.op == "call_function" and node.target in _RESHAPES:
        node = argument(node, "self")
    if node.op != "call_function":
        return None
    if node.target is aten.select.int:
        return _of_last(argument(node, "self"), argument(node, "dim"), argument(node, "index"))
    if node.target is aten.slice.Tensor:
        start, end = argument(node, "start"), argument(node, "end")
        single = isinstance(start, int) and isinstance(end, int) and end - start == 1 and argument(node, "step") == 1
        return _of_last(argument(node, "self"), argument(node, "dim"), start) if single else None
    pieces, index = (*node.args, None, None)[:2]
    if isinstance(pieces, Node) and pieces.target in _PIECES and isinstance(index, int):
        source = argument(pieces, "self")
        values = pieces.meta["val"]
        if len(values) == shape(source)[-1]:
            return _of_last(source, argument(pieces, "dim"), index)
    return None


def _of_last(source: Any, dim: Any, index: Any) -> tuple[Node, int] | None:
    if not isinstance(source, Node) or not isinstance(index, int):
        return None
    sizes = shape(source)
    if not isinstance(sizes[-1], int) or dim not in (-1, len(sizes) - 1):
        return None
    index = index + sizes[-1] if index < 0 else index
    return (source, index) if 0 <= index < sizes[-1] else None


def _has_layer(node: Node) -> bool:
    """Whether a value comes straight out of something with weights, but for what is element-wise."""
    for _ in range(16):
        info = lookup(node.target) if node.op == "call_function" else None
        if info is None:
            return False
        if info.kind is Kind.CONTRACTION:
            return any(used.op == "get_attr" for used in node.all_input_nodes)
        sources = [used for used in node.all_input_nodes if used.op == "call_function"]
        if not sources:
            return False
        node = sources[0]
    return False


def _twins(first: Node, other: Node, expert: int) -> dict[Node, Node]:
    """What one expert is made of, and what stands for it in another one, as far as they have nothing in common.

    Raises:
        _Refused: when they are built differently.
    """
    twins: dict[Node, Node] = {}
    waiting: list[tuple[Any, Any]] = [(first, other)]
    while waiting and len(twins) < _MOST_PARTS:
        a, b = waiting.pop()
        if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
            waiting += zip(a, b, strict=True)
        elif not isinstance(a, Node) or not isinstance(b, Node):
            if type(a) is not type(b) or a != b:
                raise _Refused(f"experts 0 and {expert} are built differently: {a!r} in one is {b!r} in the other")
        elif a is not b and twins.setdefault(a, b) is not b:
            raise _Refused(f"experts 0 and {expert} are wired differently at '{b.name}'")
        elif a is not b:
            why = _unlike(a, b)
            if why:
                raise _Refused(f"experts 0 and {expert} are built differently: {why}")
            if _is_call(a):
                waiting += [(list(arguments(a).values()), list(arguments(b).values()))]
    if waiting:
        raise _Refused("its experts have hardly anything in common that they start from")
    return twins


def _unlike(a: Node, b: Node) -> str | None:
    if a.op != b.op or a.op == "placeholder" or (_is_call(a) and a.target is not b.target):
        return f"'{a.name}' in one is '{b.name}' in the other"
    x, y = a.meta.get("val"), b.meta.get("val")
    if isinstance(x, Tensor) and isinstance(y, Tensor) and (x.shape != y.shape or x.dtype != y.dtype):
        return f"'{a.name}' and '{b.name}' differ in shape or dtype"
    return None


def _is_call(node: Node) -> bool:
    return node.op == "call_function"


def _check_own(rw: Rewriter, inside: set[Node], term: Node) -> None:
    """Everything that an expert is made of has to be its own."""
    for node in inside:
        others = [user.name for user in node.users if user not in inside and user is not term]
        if others:
            raise _Refused(f"'{node.name}', a part of an expert, is also used by '{others[0]}'")
        if _is_call(node) and not is_pure(node):
            raise _Refused(f"'{node.name}' draws random numbers or changes statistics")
        why = None if _is_call(node) else why_fixed(rw, node, next(iter(node.users)))
        if why is not None:
            raise _Refused(why)


def _next_sum(term: Node) -> tuple[Node, Node]:
    """The sum that a product is an operand of, and the other operand, which would be all of it without the product.

    Raises:
        _Refused: when it goes into anything else.
    """
    while True:
        user = next(iter(term.users), None)
        if user is None or len(term.users) > 1 or user.target is not aten.add.Tensor or argument(user, "alpha") != 1:
            raise _Refused(f"'{term.name}' goes into '{user.name if user else 'nothing'}', and not into one sum")
        a, b = argument(user, "self"), argument(user, "other")
        addend = b if a is term else a
        if isinstance(addend, Node):
            if addend is term or shape(addend) != shape(user) or addend.meta["val"].dtype != user.meta["val"].dtype:
                raise _Refused(f"'{user.name}' would be of another shape or dtype without '{term.name}'")
            return user, addend
        if addend != 0:
            raise _Refused(f"'{user.name}' adds {addend} to '{term.name}'")
        term = user
