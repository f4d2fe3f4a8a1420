"""The numbers written in a call that encode the size of an axis, and the axis each of them encodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Node

from graphopt.ops.arguments import argument
from graphopt.ops.info import Literal
from graphopt.ops.sizes import Size, shape, to_size

__all__ = [
    "channel_groups",
    "conv_groups",
    "output_sizes",
    "split_sizes",
    "trailing_sizes",
    "unflatten_sizes",
]


def written(value: Any) -> Size | None:
    """The size that an argument stands for: a number, or a node that makes one. None when it is not known."""
    if isinstance(value, Node):
        value = value.meta.get("val")
    return to_size(value) if isinstance(value, (int, torch.SymInt)) else None


def output_sizes(name: str) -> Callable[[Node], Iterator[Literal]]:
    """A list of the output's sizes, aligned to its last axes; -1 stands for whatever fits."""

    def literals(node: Node) -> Iterator[Literal]:
        sizes, made = argument(node, name), shape(node)
        for axis, value in enumerate(sizes, start=len(made) - len(sizes)):
            number = written(value)
            if number is not None and number != -1:
                yield Literal(name, number, "output", axis, made[axis])

    return literals


def trailing_sizes(node: Node) -> Iterator[Literal]:
    """`normalized_shape` of a layer norm: the sizes of the last axes of the input."""
    sizes, dims = argument(node, "normalized_shape"), shape(argument(node, "input"))
    for axis, value in enumerate(sizes, start=len(dims) - len(sizes)):
        number = written(value)
        if number is not None:
            yield Literal("normalized_shape", number, "input", axis, dims[axis])


def unflatten_sizes(node: Node) -> Iterator[Literal]:
    """`sizes` of an unflatten: sizes of output axes from `dim` on."""
    sizes, made = argument(node, "sizes"), shape(node)
    first = argument(node, "dim") % len(shape(argument(node, "self")))
    for axis, value in enumerate(sizes, start=first):
        number = written(value)
        if number is not None and number != -1:
            yield Literal("sizes", number, "output", axis, made[axis])


def split_sizes(name: str) -> Callable[[Node], Iterator[Literal]]:
    """A list of lengths that sum to the size of the axis `dim`."""

    def literals(node: Node) -> Iterator[Literal]:
        dims = shape(argument(node, "self"))
        axis = argument(node, "dim") % len(dims)
        numbers = [written(value) for value in argument(node, name)]
        if all(number is not None for number in numbers):
            yield Literal(name, sum(number for number in numbers if number is not None), "self", axis, dims[axis])

    return literals


def channel_groups(name: str, operand: str, axis: int, power: int = 1) -> Callable[[Node], Iterator[Literal]]:
    """A number that, raised to `power`, divides the size of `axis`: groups of a norm, a shuffle factor."""

    def literals(node: Node) -> Iterator[Literal]:
        dims, value = shape(argument(node, operand)), written(argument(node, name))
        if value is not None:
            yield Literal(name, value**power, operand, axis % len(dims), dims[axis], divides=True)

    return literals


def conv_groups(window: int, transposed: bool) -> Callable[[Node], Iterator[Literal]]:
    """`groups` of a convolution: weight [out, in/groups, ...], transposed [in, out/groups, ...]."""

    def literals(node: Node) -> Iterator[Literal]:
        groups = written(argument(node, "groups"))
        if groups is None:
            return
        dims, weight = shape(argument(node, "input")), shape(argument(node, "weight"))
        axis = len(dims) - window - 1
        yield Literal("groups", groups, "weight", 0, weight[0], divides=True)
        if transposed:
            made = shape(node)
            yield Literal("groups", groups * weight[1], "output", axis, made[axis])
        else:
            yield Literal("groups", groups * weight[1], "input", axis, dims[axis])

    return literals
