"""Layers with a weight, and normalisations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.fx import Node

from graphopt.analysis.labels.atoms import Labels, collapse, varies
from graphopt.analysis.labels.elementwise import combined
from graphopt.ops import Contracted, Normalized, OpInfo, argument

if TYPE_CHECKING:
    from graphopt.analysis.labels.trace import Trace, Traced

__all__ = ["contracted", "normalized"]


def contracted(trace: Trace, node: Node, info: OpInfo) -> Traced:
    """Positions along the input axis are read by the weight, and it makes those along the output axis."""
    axes = info.axes
    assert isinstance(axes, Contracted)
    weight, bias = trace.stored(argument(node, axes.weight)), argument(node, axes.bias, None)
    if weight is None or (bias is not None and trace.stored(bias) is None):
        return trace.barrier(node, "has a weight that is computed")
    labels, shape = trace.of(argument(node, axes.input)), trace.sizes(node)
    rank = labels.dim()
    channel, window = axes.input_axis % rank, range(rank - axes.window, rank)
    if varies(labels, window) and not varies(labels, (channel,)):
        return trace.barrier(node, "works on windows along its axis")
    if not varies(labels, (channel,)) and varies(labels, set(range(rank)) - {channel}):
        return _carried(trace, node, axes, labels, weight, bias)
    inputs = trace.atoms.tie_along(labels, channel)
    groups = trace.number(argument(node, axes.groups)) if axes.groups else 1
    place = [-1 if axis == axes.output_axis % rank else 1 for axis in range(rank)]
    made = (
        _grouped(trace, node, axes, weight, inputs, groups) if groups > 1 else _dense(trace, node, axes, weight, inputs)
    )
    if bias is not None:
        trace.slot(trace.stored(bias), 0, made, "out", node)  # type: ignore[arg-type]  # looked at above
    return made.reshape(place).expand(shape)


Stored = tuple[Node, tuple[int, ...]]


def _carried(trace: Trace, node: Node, axes: Contracted, labels: Labels, weight: Stored, bias: Any) -> Labels:
    """A layer along one axis, applied at every position of another: those positions pass, its own stay."""
    why = "has other positions beside those of its weight"
    for axis in (axes.weight_in, axes.weight_out):
        trace.keep_axis(weight, axis, node, why)
    if bias is not None:
        trace.keep_axis(trace.stored(bias), 0, node, why)  # type: ignore[arg-type]  # looked at by the caller
    rank = labels.dim()
    thin = collapse(labels, {axes.input_axis % rank, *range(rank - axes.window, rank)})
    return thin.expand(trace.sizes(node))


def _dense(trace: Trace, node: Node, axes: Contracted, weight: Stored, inputs: Labels) -> Labels:
    made = trace.made(node, trace.sizes(weight[0])[weight[1][axes.weight_out]])
    trace.slot(weight, axes.weight_in, inputs, "in", node)
    trace.slot(weight, axes.weight_out, made, "out", node)
    return made


def _grouped(trace: Trace, node: Node, axes: Contracted, weight: Stored, inputs: Labels, groups: int) -> Labels:
    """weight [out, in/groups, ...], transposed [in, out/groups, ...]: every group reads the same places of it."""
    per_group = inputs.numel() // groups
    wide = axes.weight_in if axes.transposed else axes.weight_out
    narrow = axes.weight_out if axes.transposed else axes.weight_in
    first, second = trace.sizes(weight[0])[weight[1][wide]], trace.sizes(weight[0])[weight[1][narrow]]
    each = second if axes.transposed else first // groups
    if per_group == 1:
        made = inputs.repeat_interleave(each)
        trace.slot(weight, wide, inputs if axes.transposed else made, "scale", node)
        trace.keep_axis(weight, narrow, node, "reads one channel in each group")
        return made
    grid, out = inputs.reshape(groups, per_group), trace.made(node, groups * each).reshape(groups, each)
    trace.add_grid(node, grid, out)
    trace.slot(weight, wide, inputs if axes.transposed else out.reshape(-1), "in" if axes.transposed else "out", node)
    trace.slot(weight, narrow, out if axes.transposed else grid, "out" if axes.transposed else "in", node)
    return out.reshape(-1)


def normalized(trace: Trace, node: Node, info: OpInfo) -> Traced:
    """Statistics over an axis are those of the positions that stay."""
    axes = info.axes
    assert isinstance(axes, Normalized)
    source = argument(node, "input")
    labels = trace.of(source)
    if axes.over == "trailing":
        return _trailing(trace, node, axes, source, labels)
    if any(vector.op != "get_attr" for vector in _parameters(node, axes)):
        return trace.barrier(node, "has parameters that are computed")
    if labels.dim() < 2 or (axes.over != "batch" and varies(labels, range(2, labels.dim()))):
        return trace.barrier(node, "has statistics over an axis with positions of its own")
    if not varies(labels, (1,)) and varies(labels, set(range(labels.dim())) - {1}):
        stay = "has other positions beside those of its parameters"
        for vector in _parameters(node, axes):
            trace.keep_axis((vector, (0,)), 0, node, stay)
        return labels
    positions = trace.atoms.tie_along(labels, 1)
    for vector in _parameters(node, axes):
        trace.slot((vector, (0,)), 0, positions, "scale", node)
    if axes.over == "group":
        groups = trace.number(argument(node, "num_groups"))
        if 1 < groups < positions.numel():
            trace.add_grid(node, positions.reshape(groups, -1))
    result = positions.reshape(1, -1, *[1] * (labels.dim() - 2)).expand(labels.shape)
    trace.set(source, result)
    return result


def _parameters(node: Node, axes: Normalized) -> list[Node]:
    given = [argument(node, name) for name in axes.parameters]
    return [vector for vector in given if isinstance(vector, Node)]


def _trailing(trace: Trace, node: Node, axes: Normalized, source: Node, labels: Labels) -> Labels:
    """Over the last axes: the same positions stay in every row."""
    rank, depth = labels.dim(), len(argument(node, "normalized_shape"))
    trailing = range(rank - depth, rank)
    if varies(labels, trailing) or not varies(labels, range(rank)):
        thin = collapse(labels, range(rank - depth))
        trace.atoms.tie(labels, thin)
        labels = thin.expand(labels.shape)
        trace.set(source, labels)
    operands = [labels, *(trace.of(vector) for vector in _parameters(node, axes))]
    return combined(trace, node, operands, labels.shape) if len(operands) > 1 else labels
