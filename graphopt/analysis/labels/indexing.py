"""Lookups: a table of vectors, and positions given by a tensor of indices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from graphopt.analysis.labels.atoms import Labels, settle, varies
from graphopt.analysis.labels.movement import run_movement
from graphopt.ops import Indexed, OpInfo, argument

if TYPE_CHECKING:
    from graphopt.analysis.labels.trace import Trace, Traced

__all__ = ["indexed"]


def indexed(trace: Trace, node: Node, info: OpInfo) -> Traced:
    """Known indices move data; unknown ones may only choose among positions that are all alike."""
    axes = info.axes
    assert isinstance(axes, Indexed)
    if axes.values is not None:
        return trace.barrier(node, "writes at positions that it is given")
    if str(node.target) == "aten.embedding.default":
        return _embedding(trace, node)
    table, indices = argument(node, axes.table), argument(node, axes.indices)
    listed = list(indices) if isinstance(indices, list | tuple) else [indices]
    given = [index for index in listed if isinstance(index, Node)]
    labels = trace.of(table)
    if any(trace.value(index) is None for index in given):
        chosen = _chosen_axes(node, axes, listed, labels.dim())
        if varies(labels, chosen):
            return trace.barrier(node, "chooses positions by numbers that are not known before it runs")

    def known(used: Node) -> torch.Tensor:
        found = trace.value(used)
        # All positions along the axis are alike, so the first stands for any.
        return found if found is not None else torch.zeros(trace.sizes(used), dtype=torch.int64)

    try:
        made = run_movement(node, {table: labels}, trace.number, known)
    except (RuntimeError, TypeError, IndexError, ValueError):
        return trace.barrier(node, "chooses positions in a way that could not be followed")
    assert isinstance(made, torch.Tensor)
    return settle(made)


def _chosen_axes(node: Node, axes: Indexed, indices: list[Any], rank: int) -> list[int]:
    """Axes of the table along which the indices choose; all of them for an operator that reads element by element."""
    if isinstance(argument(node, axes.indices), list | tuple):
        return [axis for axis, index in enumerate(indices) if index is not None]
    if str(node.target) == "aten.index_select.default":
        return [argument(node, "dim") % rank]
    return list(range(rank))


def _embedding(trace: Trace, node: Node) -> Traced:
    """weight [entries, size]: a lookup makes vectors of new positions."""
    stored = trace.stored(argument(node, "weight"))
    if stored is None:
        return trace.barrier(node, "looks up in a table that is computed")
    if varies(trace.of(argument(node, "indices")), range(len(trace.sizes(argument(node, "indices"))))):
        return trace.barrier(node, "looks up numbers that vary with removable positions")
    made = trace.made(node, trace.sizes(stored[0])[stored[1][1]])
    trace.keep_axis(stored, 0, node, "may be asked for any entry of it")
    trace.slot(stored, 1, made, "out", node)
    labels: Labels = made.expand(trace.sizes(node))
    return labels
