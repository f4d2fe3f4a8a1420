"""Windows, scans and reductions: axes along which elements meet, and others along which they do not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.fx import Node

from graphopt.analysis.labels.atoms import Labels, collapse, uniform, varies
from graphopt.ops import Along, OpInfo, Reduced, Windowed, argument

if TYPE_CHECKING:
    from graphopt.analysis.labels.trace import Trace, Traced

__all__ = ["along", "reduced", "windowed"]

_TELL_POSITIONS = frozenset(
    f"aten.{name}"
    for name in (
        "argmax.default",
        "argmin.default",
        "max.dim",
        "min.dim",
        "median.dim",
        "nanmedian.dim",
        "mode.default",
    )
)
"""Reductions that return numbers of positions, which mean something else when others are removed."""


def windowed(trace: Trace, node: Node, info: OpInfo) -> Traced:
    """Pooling and resampling: labels pass along every axis that is not pooled."""
    assert isinstance(info.axes, Windowed)
    return _passed(trace, node, info, trace.of(argument(node, info.axes.operand)), "works on windows along its axis")


def along(trace: Trace, node: Node, info: OpInfo) -> Traced:
    """Softmax, scans and sorting along one axis; a GLU joins the halves of its axis."""
    assert isinstance(info.axes, Along)
    labels = trace.of(argument(node, info.axes.operand))
    if str(node.target) == "aten.glu.default":
        return _halves(trace, node, labels, argument(node, "dim") % labels.dim())
    return _passed(trace, node, info, labels, "lets its positions meet")


def _passed(trace: Trace, node: Node, info: OpInfo, labels: Labels, why: str) -> Traced:
    mixed = info.axes.mixed(node)
    assert mixed is not None
    if varies(labels, mixed):
        trace.atoms.pin(labels, node, why)
        pinned = trace.atoms.pinned(node, why)
        return trace.like(node, lambda shape: uniform(pinned, shape))
    thin = collapse(labels, mixed)
    return trace.like(node, lambda shape: thin.expand(shape))


def _halves(trace: Trace, node: Node, labels: Labels, axis: int) -> Labels:
    size = labels.shape[axis] // 2
    left, right = labels.narrow(axis, 0, size), labels.narrow(axis, size, size)
    trace.atoms.tie(left, right)
    return left


def reduced(trace: Trace, node: Node, info: OpInfo) -> Traced:
    """Along a reduced axis, what is removed no longer counts: a sum loses terms, a mean is one of what stays."""
    assert isinstance(info.axes, Reduced)
    labels, axes = trace.of(argument(node, "self")), info.axes.mixed(node)
    if not varies(labels, axes):
        thin = collapse(labels, axes)
    elif str(node.target) in _TELL_POSITIONS or varies(labels, set(range(labels.dim())) - set(axes)):
        trace.atoms.pin(labels, node, "reduces its positions among others that vary, or tells which they are")
        thin = uniform(trace.atoms.pinned(node, "is made of all positions"), [1] * labels.dim())
    else:
        thin = uniform(0, [1] * labels.dim())
    keeps = info.axes.keepdim is not None and bool(argument(node, info.axes.keepdim, False))
    if not keeps:
        thin = thin.reshape([size for axis, size in enumerate(thin.shape) if axis not in axes])
    return trace.like(node, lambda shape: thin.expand(shape))
