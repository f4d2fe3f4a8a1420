"""Values that are known before any input is: numbers, stored tensors, and what is computed from those alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphopt.ops import is_pure, lookup
from graphopt.params import ParamKind
from graphopt.rewriter import Node, Rewriter

__all__ = ["Stored", "read_stored"]

_LONGEST = 8
"""Operators that a computed constant may take; longer ones are the work of fold-constants."""


@dataclass(frozen=True)
class Stored:
    """A constant operand: its value in float64, and the dtype it takes part with (None: a number, or a 0-d tensor,
    which leaves the dtype of the other operand alone)."""

    value: torch.Tensor
    dtype: torch.dtype | None
    trainable: bool

    def varies(self, rank: int) -> int | str | None:
        """The one axis of a tensor of `rank` axes along which the value varies; None when it is one value."""
        offset = rank - self.value.dim()
        axes = [axis + offset for axis, size in enumerate(self.value.shape) if size != 1]
        if len(axes) > 1:
            return f"its tensor varies along the axes {axes}, not along channels alone"
        return axes[0] if axes else None


def read_stored(rw: Rewriter, operand: Any, user: Node) -> Stored | str | None:
    """The constant that `operand` of `user` is; None when it depends on an input; or why it may not be folded away."""
    if isinstance(operand, bool | complex):
        return "its operand is no real number"
    if isinstance(operand, int | float):
        return Stored(torch.tensor(operand, dtype=torch.float64), None, False)
    nodes = _closure(operand)
    if nodes is None:
        return None
    fake = rw.fake(operand)
    if not fake.dtype.is_floating_point and (fake.dim() or fake.dtype.is_complex or fake.dtype is torch.bool):
        return f"its tensor is {fake.dtype}"
    if sum(size != 1 for size in fake.shape) > 1:
        return "its tensor varies along several axes, not along channels alone"
    why = _why_not_folded_away(rw, nodes, user)
    if why is not None:
        return why
    leaves = [node for node in nodes if node.op == "get_attr"]
    trainable = any(rw.params[str(leaf.target)].requires_grad for leaf in leaves)
    return Stored(_evaluate(rw, operand), fake.dtype if fake.dim() else None, trainable)


def _closure(operand: Any) -> frozenset[Node] | None:
    """All nodes that `operand` is computed from, itself included; None when one is an input, impure or unknown."""
    found: set[Node] = set()
    stack = [operand]
    while stack:
        node = stack.pop()
        if node in found:
            continue
        if not isinstance(node, Node) or len(found) > _LONGEST:
            return None
        known = node.op == "call_function" and lookup(node.target) is not None and is_pure(node)
        if node.op != "get_attr" and not (known and node.all_input_nodes):
            return None
        found.add(node)
        stack.extend(node.all_input_nodes)
    return frozenset(found)


def _why_not_folded_away(rw: Rewriter, nodes: frozenset[Node], user: Node) -> str | None:
    """Why a parameter among `nodes` may not vanish into a weight: something but `user` needs it, or has no data."""
    leaves = [node for node in nodes if node.op == "get_attr"]
    if any(rw.params[str(leaf.target)].device.type == "meta" for leaf in leaves):
        return "its tensor has no data"
    parameters = [leaf for leaf in leaves if rw.params.kind(str(leaf.target)) is ParamKind.PARAMETER]
    if not parameters:
        return None
    inside = {*nodes, user}
    for node in (*parameters, *(node for node in nodes if node.op != "get_attr")):
        others = [other.name for other in node.users if other not in inside]
        if others:
            return f"'{node.name}' is also used by '{others[0]}'"
    shared = (rw.why_shared(leaf, next(iter(leaf.users))) for leaf in parameters)
    return next((why for why in shared if why is not None), None)


def _evaluate(rw: Rewriter, operand: Node) -> torch.Tensor:
    """The value in float64, every floating leaf taken in float64."""
    done: dict[Node, Any] = {}

    def value(node: Any) -> Any:
        if not isinstance(node, Node):
            return node
        if node not in done:
            stored = rw.tensor(node)
            if stored is not None:
                done[node] = stored.double() if stored.dtype.is_floating_point else stored
            else:
                args, kwargs = pytree.tree_map(value, (node.args, node.kwargs))
                done[node] = node.target(*args, **kwargs)  # type: ignore[operator]  # an overload, by _closure
        return done[node]

    with torch.no_grad():
        result: torch.Tensor = value(operand)
    return result.double()
