"""What an expansion does to the numbers, call by call: that nothing is summed, averaged or drawn over what is new."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from graphopt.analysis.labels import Trace, axis_positions
from graphopt.analysis.labels.products import Terms
from graphopt.analysis.removal import Conflict, Kept
from graphopt.ops import (
    Along,
    Broadcast,
    Contracted,
    Created,
    Indexed,
    Moved,
    Normalized,
    Product,
    Reduced,
    Windowed,
    argument,
    equation,
    is_pure,
    lookup,
    operands,
)
from graphopt.passes._expansion import Growth, Silence
from graphopt.rewriter import Node

__all__ = ["ATTENTION", "SUMS", "ZERO_AT_ZERO", "meetings", "silence", "terms_of", "why_inexact"]

ATTENTION = "aten.scaled_dot_product_attention.default"
SUMS = ("aten.add.Tensor", "aten.sub.Tensor")
ZERO_AT_ZERO = frozenset(
    ("mul", "div", "neg", "clone", "contiguous", "to", "_to_copy", "type_as", "dropout", "relu", "tanh", "silu", "gelu")
)


def why_inexact(growth: Growth, *, copied: bool) -> str | None:
    """Why a growth would change the outputs, though what reads new positions has weights of zero; None if it would
    not. Products of queries and keys are left to `silence`.

    Args:
        copied: whether what is new equals what it is a copy of, so that means over all of it stay the same.

    Raises:
        Conflict: when the growth is impossible.
    """
    for node in growth.coupling.model.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        inputs = [used for used in node.all_input_nodes if _is_grown(growth.each(used))]
        if inputs or _is_grown(growth.each(node)):
            why = _why(growth, node, copied)
            if why is not None:
                return f"'{node.name}' {why}"
    return None


def _is_grown(each: list[Kept]) -> bool:
    return any(positions is not None for kept in each for positions in kept)


def _why(growth: Growth, node: Node, copied: bool) -> str | None:
    info = lookup(node.target)
    axes = info.axes if info is not None else None
    if not is_pure(node):
        return "draws random numbers, or updates statistics of batches, for what would be new"
    if isinstance(axes, Contracted):
        groups = growth.coupling.trace.number(argument(node, axes.groups)) if axes.groups else 1
        return "has groups, whose weights do not read all positions" if groups > 1 else None
    if isinstance(axes, Broadcast | Created | Moved | Indexed | Product) or str(node.target) == "aten.glu.default":
        return None
    if not isinstance(axes, Normalized | Reduced | Along | Windowed):
        return "is an operator about which too little is known"
    name = "input" if isinstance(axes, Normalized) else "self" if isinstance(axes, Reduced) else axes.operand
    kept, mixed = growth.of(argument(node, name)), axes.mixed(node)
    touched = [positions for axis in mixed or () if (positions := kept[axis]) is not None]
    if mixed is None or (touched and not (copied and _averages(node, axes) and all(map(_is_even, touched)))):
        return "takes a statistic, or another function, of all positions, to which new ones would add"
    return None


def _averages(node: Node, axes: Normalized | Reduced | Along | Windowed) -> bool:
    """Whether a call only takes means, which stay the same when every element is there equally often."""
    return str(node.target) == "aten.mean.dim" or (isinstance(axes, Normalized) and axes.over == "trailing")


def _is_even(positions: Tensor) -> bool:
    counts = positions.bincount()
    return bool((counts == counts[0]).all())


# Queries and keys


def terms_of(trace: Trace, node: Node) -> Terms | None:
    """The letters of a product of two tensors that are both computed; None for any other call."""
    info = lookup(node.target) if node.op == "call_function" else None
    if info is None or not isinstance(info.axes, Product) or str(node.target) == ATTENTION:
        return None
    factors = operands(node)
    if len(factors) != 2 or any(trace.stored(one) is not None for one in factors):
        return None
    return Terms.of(equation(node), trace.sizes(factors[0]), trace.sizes(factors[1]))


def meetings(growth: Growth) -> Iterator[tuple[Node, Node, Node]]:
    """Products that sum over new positions of both factors: the call, its queries and its keys."""
    for node in growth.coupling.model.graph.nodes:
        terms = terms_of(growth.coupling.trace, node)
        if node.op == "call_function" and str(node.target) == ATTENTION:
            query, key = argument(node, "query"), argument(node, "key")
            if growth.of(query)[-1] is not None or growth.of(key)[-1] is not None:
                yield node, query, key
        elif terms is not None:
            query, key = operands(node)
            kept = dict(zip(terms.left, growth.of(query), strict=True))
            if any(kept[letter] is not None for letter in terms.inner):
                yield node, query, key


def silence(growth: Growth) -> Silence:
    """What has to be zero so that no product of queries and keys changes: whatever makes the new features of keys.

    Raises:
        Conflict: when keys cannot be told from queries, or pass something that does not leave zeros alone.
    """
    found: Silence = {}
    params = growth.coupling.model.params
    for node, query, key in meetings(growth):
        of_queries = _makers(growth, query)
        taken = {id(params[str(one.target)]) for maker in of_queries for one, _ in _stored_by(growth, maker)}
        for maker, atoms in _makers(growth, key).items():
            mine = torch.ones(len(atoms), dtype=torch.bool)
            if maker in of_queries:
                mine = _told_apart(growth, node, atoms, query, key)
            for tensor, axis in _stored_by(growth, maker):
                if maker not in of_queries and id(params[str(tensor.target)]) in taken:
                    raise Conflict(f"'{tensor.target}' makes queries as well as keys", where=f"'{node.name}'")
                found[str(tensor.target), axis] = found.get((str(tensor.target), axis), torch.zeros_like(mine)) | mine
    return found


def _makers(growth: Growth, operand: Node) -> dict[Node, Tensor]:
    """The calls in front of an operand whose stored tensors make its new positions, each with its atoms [size]."""
    trace, found = growth.coupling.trace, {}
    waiting, seen = [operand], {operand}
    while waiting:
        node = waiting.pop()
        if node.op != "call_function" or not _is_grown(growth.each(node)):
            continue
        if node in trace.origins or _adds_stored(growth, node):
            axis = next(axis for axis, positions in enumerate(growth.of(node)) if positions is not None)
            found[node] = axis_positions(trace.of(node), axis)
        if node not in trace.origins:
            if not _keeps_zeros(growth, node):
                raise Conflict("keys pass it, and it may make something else of zeros", where=f"'{node.name}'")
            waiting += [used for used in node.all_input_nodes if used not in seen]
            seen.update(node.all_input_nodes)
    return found


def _adds_stored(growth: Growth, node: Node) -> bool:
    return str(node.target) in SUMS and any(
        used.op == "get_attr" and _is_grown(growth.each(used)) for used in node.all_input_nodes
    )


def _keeps_zeros(growth: Growth, node: Node) -> bool:
    """Whether new positions are zero behind a call if those in front of it are."""
    name, info = str(node.target).removeprefix("aten.").partition(".")[0], lookup(node.target)
    if str(node.target) in SUMS:
        return all(isinstance(one, Node) and _is_grown(growth.each(one)) for one in _terms(node))
    if info is None or isinstance(info.axes, Broadcast):
        return info is None or name in ZERO_AT_ZERO
    return isinstance(info.axes, Moved | Indexed | Product)


def _terms(node: Node) -> tuple[object, object]:
    return argument(node, "self"), argument(node, "other")


def _told_apart(growth: Growth, node: Node, atoms: Tensor, query: Node, key: Node) -> Tensor:
    """Which positions of a layer that makes queries and keys are features of keys."""
    coupling = growth.coupling

    def of(operand: Node) -> Tensor:
        labels = coupling.trace.of(operand)
        found: Tensor = torch.masked_select(labels, growth.places(labels).expand(labels.shape)).unique()
        return found

    queries, keys = torch.isin(atoms, of(query)), torch.isin(atoms, of(key))
    either = torch.isin(coupling.of(atoms), coupling.of(of(key))) & growth.places(atoms)
    if bool((queries & keys).any()) or bool((either & ~queries & ~keys).any()):
        raise Conflict("one layer makes queries and keys, which cannot be told apart", where=f"'{node.name}'")
    return keys


def _stored_by(growth: Growth, maker: Node) -> Iterator[tuple[Node, int]]:
    """The stored tensors of a call that make new positions, and along which axis."""
    slots = growth.coupling.trace.slots
    named = [(slot.tensor, slot.axis) for slot in slots if slot.user is maker and slot.role == "out"]
    yield from named
    for used in maker.all_input_nodes:
        if used.op == "get_attr" and used not in [tensor for tensor, _ in named]:
            yield from ((used, axis) for axis, positions in enumerate(growth.each(used)[0]) if positions is not None)
