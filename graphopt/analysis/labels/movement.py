"""Operators that only move data: they are run on the labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx import Node
from torch.utils import _pytree as pytree

from graphopt.analysis.labels.atoms import Labels, collapse, compact, settle, uniform, varies
from graphopt.analysis.labels.elementwise import combined
from graphopt.ops import Moved, OpInfo, argument, arguments

if TYPE_CHECKING:
    from graphopt.analysis.labels.trace import Trace, Traced

__all__ = ["moved", "run_movement"]

_TOGETHER = frozenset({"aten.expand_as.default", "aten.broadcast_tensors.default"})
"""Movements into the shape of other operands, which they go with from then on."""
_PADS = frozenset({"aten.constant_pad_nd.default", "aten.pad.default"})
_SHAPED = frozenset({"aten.view_as.default", "aten.reshape_as.default"})


def moved(trace: Trace, node: Node, info: OpInfo) -> Traced:
    """Run the operator on the labels of what it moves; what it fills in has the label 0."""
    assert isinstance(info.axes, Moved)
    values = [v for v in pytree.tree_leaves([argument(node, n) for n in info.axes.values]) if isinstance(v, Node)]
    labels = [trace.of(value) for value in values]
    kinds = {int(compact(one).flatten()[0]) for one in labels if compact(one).numel() == 1}
    plain = len(kinds) == 1 and all(compact(one).numel() == 1 for one in labels)
    if str(node.target) in _TOGETHER:
        operands = [trace.of(used) for used in node.all_input_nodes]
        return trace.like(node, lambda shape: combined(trace, node, operands, shape))
    if str(node.target) in _SHAPED:
        return trace.barrier(node, "takes its shape from another tensor")
    if plain:
        return trace.like(node, lambda shape: uniform(next(iter(kinds)), shape))
    try:
        made = run_movement(node, {value: trace.of(value) for value in values}, trace.number, trace.value)
    except (RuntimeError, NotImplementedError, TypeError, IndexError, ValueError) as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return trace.barrier(node, f"moves data in a way that could not be followed ({text})")
    if isinstance(made, list):
        return [settle(one) for one in made]
    if str(node.target) in _PADS:
        # Padding goes with what it lies beside, but along an axis that has positions of its own.
        made = collapse(made, [d for d in range(made.dim()) if not varies(labels[0], (d,))]).expand(made.shape)
    return settle(made)


def run_movement(
    node: Node,
    given: Mapping[Node, Labels],
    number: Callable[[Any], Any],
    known: Callable[[Node], torch.Tensor | None],
    *,
    fill: int = 0,
    changes: Mapping[str, Any] | None = None,
) -> Labels | list[Labels]:
    """The operator of `node` on whole numbers: `given` in the place of what it moves, `fill` for what it fills in.

    `number` makes a number of a size, `known` gives the elements of a constant tensor or None; `changes` are arguments
    to use instead of those of the call.

    Raises:
        RuntimeError, and what else the operator raises for operands that it does not take.
    """

    named = arguments(node) | dict(changes or {})
    if "value" in named and not isinstance(named["value"], Node):
        named["value"] = fill
    try:
        made = _called(node, named, given, number, known)
    except RuntimeError:
        # Labels have strides of their own, which a view may not like.
        made = _called(node, named, {used: one.contiguous() for used, one in given.items()}, number, known)
    return list(made) if isinstance(made, tuple | list) else made


def _called(
    node: Node,
    named: Mapping[str, Any],
    given: Mapping[Node, Labels],
    number: Callable[[Any], Any],
    known: Callable[[Node], torch.Tensor | None],
) -> Any:
    def operand(used: Node) -> Any:
        if used in given:
            return given[used]
        if isinstance(used.meta.get("val"), torch.Tensor):
            constant = known(used)
            if constant is None:
                raise ValueError(f"'{used.name}' is not known before the model runs")
            return constant
        return number(used)

    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for row in node.target._schema.arguments:  # type: ignore[union-attr]  # an overload
        if row.name in named:
            value = fx.map_arg(named[row.name], operand)
            if row.kwarg_only:
                kwargs[row.name] = value
            else:
                args.append(value)
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]  # an overload
