"""Element-wise operators: what stands at one place of the operands goes together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from graphopt.analysis.labels.atoms import Labels, uniform, varies
from graphopt.ops import Broadcast, OpInfo, argument, tensor_arguments

if TYPE_CHECKING:
    from graphopt.analysis.labels.trace import Trace

__all__ = ["broadcast", "combined", "created"]


def broadcast(trace: Trace, node: Node, info: OpInfo) -> Labels | list[Labels]:
    """Operands that broadcast together, and vectors along axis 1 of the first."""
    axes = info.axes
    assert isinstance(axes, Broadcast)
    shape = trace.sizes(node)
    names = axes.operands or tuple(tensor_arguments(node))
    given = pytree.tree_leaves([argument(node, name) for name in names])
    operands = [trace.of(operand) for operand in given if isinstance(operand, Node)]
    for name in axes.per_channel:
        vector = trace.of(argument(node, name))
        operands.append(vector.reshape(-1, *[1] * (len(shape) - 2)) if len(shape) > 1 else vector)
    return combined(trace, node, operands, shape)


def created(trace: Trace, node: Node, info: OpInfo) -> Labels | list[Labels] | None:
    """A tensor made in the shape of another goes with it; others are constants."""
    shaped = [used for used in node.all_input_nodes if isinstance(used.meta.get("val"), torch.Tensor)]

    def make(shape: tuple[int, ...]) -> Labels:
        alike = [trace.of(used) for used in shaped if trace.sizes(used) == shape and used.op != "get_attr"]
        return combined(trace, node, alike, shape) if alike else uniform(0, shape)

    return trace.like(node, make)


def combined(trace: Trace, node: Node, operands: Sequence[Labels], shape: Sequence[int]) -> Labels:
    """The labels of what operands become that are broadcast to `shape`.

    An operand that is broadcast along an axis on which another one has positions has none of its own there: it stays
    whole, whatever of the result is removed.
    """
    rank = len(shape)
    aligned = [labels.reshape((1,) * (rank - labels.dim()) + tuple(labels.shape)) for labels in operands]
    changing = [{axis for axis in range(rank) if varies(labels, (axis,))} for labels in aligned]
    full: list[tuple[int, Labels]] = []
    for index, labels in enumerate(aligned):
        spread = {axis for axis in range(rank) if labels.shape[axis] == 1 and shape[axis] > 1}
        if any(spread & other for place, other in enumerate(changing) if place != index):
            trace.atoms.pin(labels, node, "broadcasts it over an axis that has positions of its own")
        else:
            full.append((len(changing[index]), labels.expand(tuple(shape))))
    if not full:
        return uniform(0, shape)
    # The plainest operand names the result: ties make its labels hold for the others too.
    first, *others = (labels for _, labels in sorted(full, key=lambda pair: pair[0]))
    for labels in others:
        trace.atoms.tie(first, labels)
        first = _filled(first, labels)
    return first


def _filled(labels: Labels, other: Labels) -> Labels:
    """`labels`, with those of `other` where it has none."""
    if bool((labels != 0).all()) or not bool((other != 0).any()):
        return labels
    return torch.where(labels == 0, other, labels)
