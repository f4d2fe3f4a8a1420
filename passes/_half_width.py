"""A layer at half its width, to measure how much of its time goes with its channels.

A layer of n channels takes a + b n: padding, edges, threads and memory have their part a, which stays when channels go.
With t the seconds at full width and t' those at half of it, in and out, the part that can be saved is about
(t - t') / (1 - s), s being what is left of the multiply-accumulates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Graph

from graphopt.measure import LatencyTable
from graphopt.ops import arguments
from graphopt.rewriter import Node

__all__ = ["saveable"]

aten = torch.ops.aten
_CHANNELS = {aten.linear.default: -1, aten.conv1d.default: 1, aten.conv2d.default: 1, aten.conv3d.default: 1}
"""Layers, and which axis of their input the channels are."""
_FEWEST = 8
"""Channels that an input has at least to be one whose channels can go; images have 3."""


def saveable(table: LatencyTable, node: Node, step: int) -> float:
    """Seconds of a call that go with its channels, at most those that it takes."""
    seconds = table.seconds(node)
    half = _half(node, table.shapes.number, step)
    if half is None or half.left >= 1:
        return seconds
    return min(seconds, max(0.0, seconds - table.seconds(half.node)) / (1 - half.left))


@dataclass(frozen=True)
class _Half:
    """A narrower layer, and the part of the multiply-accumulates that it has."""

    node: Node
    left: float


def _half(node: Node, number: Callable[[int | torch.SymInt], int], step: int) -> _Half | None:
    """The layer in a graph of its own, of tensors without data; None for what is no plain or depthwise layer."""
    given = arguments(node)
    weight = given.get("weight")
    if node.target not in _CHANNELS or not isinstance(weight, Node) or weight.op != "get_attr":
        return None
    outputs, inputs, *window = weight.meta["val"].shape
    groups = given.get("groups", 1)
    if groups not in (1, outputs):
        return None
    x = given["input"].meta["val"]
    sizes = [number(size) for size in x.shape]
    fewer = _rounded(outputs, step)
    read = fewer if groups > 1 else (_rounded(inputs, step) if inputs >= _FEWEST else inputs)
    sizes[_CHANNELS[node.target]] = read
    shapes = {"input": sizes, "weight": [fewer, 1 if groups > 1 else read, *window], "bias": [fewer]}
    left = fewer / outputs if groups > 1 else fewer * read / (outputs * inputs)
    return _Half(_alone(node, shapes, fewer if groups > 1 else 1), left)


def _rounded(width: int, step: int) -> int:
    """About half, of vectors that are full where there is one."""
    return max(step, width // 2 // step * step) if width >= 2 * step else max(1, width // 2)


def _alone(node: Node, shapes: dict[str, list[int]], groups: int) -> Node:
    graph = Graph()
    given = dict(arguments(node))
    for name, shape in shapes.items():
        if isinstance(given.get(name), Node):
            made = graph.placeholder(name) if name == "input" else graph.create_node("get_attr", name)
            made.meta["val"] = torch.empty(shape, dtype=given[name].meta["val"].dtype, device="meta")
            given[name] = made
    if "groups" in given:
        given["groups"] = groups
    return graph.call_function(node.target, (), given)  # type: ignore[arg-type]  # an overload
