"""Operators that only renumber elements: reshapes, permutations of axes, and copies."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from graphopt.ops import argument
from graphopt.rewriter import Node

__all__ = ["COPIES", "RESHAPES", "SPLITS", "is_reshape", "name_of", "overloads", "permutation"]


def overloads(names: str) -> frozenset[str]:
    """Overload names from a blank-separated list; `relu` means `relu.default`."""
    return frozenset(name if "." in name else f"{name}.default" for name in names.split())


RESHAPES = overloads(
    """view reshape _unsafe_view view_as reshape_as ravel flatten.using_ints unflatten.int squeeze squeeze.dim
    squeeze.dims unsqueeze"""
)
"""Overloads that keep the elements in row-major order and change the axes."""

SQUEEZES = overloads("squeeze squeeze.dim squeeze.dims")

COPIES = overloads("contiguous clone alias alias_copy lift_fresh_copy")
"""Overloads that return their input, stored elsewhere or in another order."""

SPLITS = overloads(
    """split.Tensor split.sizes split_with_sizes chunk tensor_split.sections tensor_split.indices unsafe_split.Tensor
    unsafe_split_with_sizes unsafe_chunk"""
)
"""Overloads that cut a tensor along one axis and return the pieces."""


def name_of(node: Node) -> str:
    """`slice.Tensor` for a call of `aten.slice.Tensor`, `getitem` for the builtin; empty for what is no ATen call."""
    return _name_of(node.target) if node.op == "call_function" else ""


@cache
def _name_of(target: Any) -> str:
    if target is operator.getitem:
        return "getitem"
    text = str(target)
    return text.removeprefix("aten.") if text.startswith("aten.") else ""


def is_reshape(node: Node) -> bool:
    """Whether the call keeps the elements in row-major order and always has the rank it has now.

    To squeeze an axis whose size is free is something else: it drops the axis whenever the size happens to be one.
    """
    name = name_of(node)
    if name not in SQUEEZES:
        return name in RESHAPES
    size = argument(node, "self").meta["val"].shape
    dims = argument(node, "dim", None) if name != "squeeze.default" else range(len(size))
    return not any(isinstance(size[dim], torch.SymInt) for dim in (dims if not isinstance(dims, int) else [dims]))


def permutation(node: Node) -> tuple[int, ...] | None:
    """For every axis of the output the axis of the input it is; None when the call permutes no axes."""
    rule = _PERMUTATIONS.get(name_of(node))
    return None if rule is None else rule(node, node.meta["val"].dim())


def _permute(node: Node, axes: int) -> tuple[int, ...]:
    return tuple(dim % axes for dim in argument(node, "dims"))


def _swap(first: str, second: str) -> Callable[[Node, int], tuple[int, ...]]:
    def rule(node: Node, axes: int) -> tuple[int, ...]:
        order = list(range(axes))
        if axes:
            a, b = argument(node, first) % axes, argument(node, second) % axes
            order[a], order[b] = order[b], order[a]
        return tuple(order)

    return rule


def _swap_last(node: Node, axes: int) -> tuple[int, ...]:
    return (*range(axes - 2), axes - 1, axes - 2) if axes >= 2 else tuple(range(axes))


def _move(node: Node, axes: int) -> tuple[int, ...]:
    sources, destinations = (_listed(argument(node, name), axes) for name in ("source", "destination"))
    rest = iter(axis for axis in range(axes) if axis not in sources)
    moved = dict(zip(destinations, sources, strict=True))
    return tuple(moved[axis] if axis in moved else next(rest) for axis in range(axes))


def _listed(value: Any, axes: int) -> list[int]:
    return [axis % axes for axis in (value if isinstance(value, list | tuple) else [value])]


_PERMUTATIONS: dict[str, Callable[[Node, int], tuple[int, ...]]] = {
    "permute.default": _permute,
    "transpose.int": _swap("dim0", "dim1"),
    "swapaxes.default": _swap("axis0", "axis1"),
    "swapdims.default": _swap("dim0", "dim1"),
    "t.default": _swap_last,
    "mT.default": _swap_last,
    "numpy_T.default": lambda node, axes: tuple(reversed(range(axes))),
    "movedim.int": _move,
    "movedim.intlist": _move,
    "moveaxis.int": _move,
    "moveaxis.intlist": _move,
}
