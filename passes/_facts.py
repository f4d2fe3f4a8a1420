"""What is known about the values of a graph while a pass walks it in order: bounds, gradients, writes, zeros."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, TypeAlias

import torch

from graphopt.fake import FakeTensor
from graphopt.ops import argument, is_pure, lookup
from graphopt.params import ParamKind
from graphopt.passes._reindexing import COPIES, RESHAPES, SPLITS, name_of, overloads, permutation
from graphopt.rewriter import Node, Rewriter

__all__ = ["Bounds", "Facts", "is_written"]

Bounds: TypeAlias = tuple[float, float]

_RANGES: dict[str, Bounds] = {
    "sigmoid.default": (0.0, 1.0),
    "hardsigmoid.default": (0.0, 1.0),
    "tanh.default": (-1.0, 1.0),
    "softmax.int": (0.0, math.inf),
    "exp.default": (0.0, math.inf),
    "square.default": (0.0, math.inf),
    "abs.default": (0.0, math.inf),
}
_SELECTIONS = RESHAPES | COPIES | SPLITS | {"getitem"} | overloads("slice.Tensor select.int expand max_pool2d")
"""Operators whose every output element is an element of their first input; so are permutations."""

_TELL_ZEROS_APART = overloads(
    """reciprocal rsqrt atan2 arctan2 copysign.Tensor signbit float_power.Tensor_Scalar float_power.Tensor_Tensor
    pow.Tensor_Tensor digamma special_digamma special_psi"""
)
_QUOTIENTS = ("div.Tensor", "divide.Tensor", "true_divide.Tensor")
_LARGEST_UNIFORM = 4096


class Facts:
    """Facts about nodes that `visit` has seen; visit them in order."""

    def __init__(self, rw: Rewriter) -> None:
        self.rw = rw
        self._bounds: dict[Node, Bounds] = {}
        self._gradient = {node for node in rw.graph.nodes if self._starts_gradient(node)}

    def visit(self, node: Node) -> None:
        """Learn what follows about `node` from what is known about its inputs."""
        if self._passes_gradient(node):
            self._gradient.add(node)
        bounds = self._bounds_of(node)
        if bounds is not None:
            self._bounds[node] = bounds

    # Gradients

    def carries_gradient(self, node: Node) -> bool:
        """Whether a loss could have a gradient by this value: through a parameter or an input that floats."""
        return node in self._gradient

    def _starts_gradient(self, node: Node) -> bool:
        if node.op == "placeholder":
            return self.is_floating(node)
        return node.op == "get_attr" and self.rw.params.kind(str(node.target)) is ParamKind.PARAMETER

    def _passes_gradient(self, node: Node) -> bool:
        if name_of(node) in ("detach.default", "detach_copy.default"):
            return False
        return any(used in self._gradient for used in node.all_input_nodes) and self.is_floating(node)

    def is_floating(self, node: Node) -> bool:
        """Whether a tensor, or any of several, holds floating-point numbers."""
        value = self.rw.value(node)
        values = value if isinstance(value, tuple | list) else [value]
        return any(isinstance(v, FakeTensor) and (v.is_floating_point() or v.is_complex()) for v in values)

    # Kinds

    def same_kind(self, a: Node, b: Node) -> bool:
        """Whether two nodes make one tensor each, of the same dtype, device and layout."""
        x, y = self.rw.value(a), self.rw.value(b)
        if not isinstance(x, FakeTensor) or not isinstance(y, FakeTensor):
            return False
        return x.dtype == y.dtype and x.device == y.device and x.layout == y.layout

    # Values

    def uniform(self, value: Any) -> Any:
        """The number that `value` is, or that all elements of a small constant are; None for everything else."""
        if isinstance(value, int | float):
            return value
        if not isinstance(value, Node) or value.op != "get_attr" or is_written(value):
            return None
        if self.rw.params.kind(str(value.target)) is ParamKind.PARAMETER:
            return None
        tensor = self.rw.params[str(value.target)]
        if tensor.device.type == "meta" or not 0 < tensor.numel() <= _LARGEST_UNIFORM:
            return None
        first = tensor.reshape(-1)[0]
        return first.item() if bool(torch.all(tensor == first)) else None

    def unless_zeros_differ(self, kept: Node) -> Node | str:
        """`kept`, or the reason to keep an operator that turns -0.0 into 0.0."""
        if self._apart is None:
            return kept
        return f"it turns -0.0 into 0.0, and '{self._apart}' may tell them apart"

    @cached_property
    def _apart(self) -> str | None:
        """An operator whose result for 0.0 and for -0.0 differs by more than the sign of a zero."""
        return next((node.name for node in self.rw.graph.nodes if _tells_zeros_apart(node)), None)

    # Bounds

    def bounds(self, node: Node) -> Bounds | None:
        """Between which two numbers all elements lie (those that are no NaN)."""
        return self._bounds.get(node)

    def clamped_to(self, node: Node) -> Bounds | None:
        """The bounds that a call of the clamp family enforces; None for other calls and for bounds that are tensors."""
        name = name_of(node)
        if name in ("relu.default", "relu6.default"):
            return 0.0, (math.inf if name == "relu.default" else 6.0)
        if name == "hardtanh.default":
            return float(argument(node, "min_val")), float(argument(node, "max_val"))
        if name not in ("clamp.default", "clip.default", "clamp_min.default", "clamp_max.default"):
            return None
        low = None if name == "clamp_max.default" else argument(node, "min")
        high = None if name == "clamp_min.default" else argument(node, "max")
        if isinstance(low, Node) or isinstance(high, Node):
            return None
        highest = math.inf if high is None else float(high)
        return min(-math.inf if low is None else float(low), highest), highest

    def _bounds_of(self, node: Node) -> Bounds | None:
        clamped = self.clamped_to(node)
        if clamped is not None:
            return clamped
        name = name_of(node)
        if name in _SELECTIONS or permutation(node) is not None:
            return self._bounds.get(node.all_input_nodes[0])
        if name in ("cat.default", "maximum.default", "minimum.default"):
            found = [self._bounds.get(used) for used in node.all_input_nodes]
            known = [bounds for bounds in found if bounds is not None]
            return (min(b[0] for b in known), max(b[1] for b in known)) if known and len(known) == len(found) else None
        return _RANGES.get(name)


def is_written(node: Node) -> bool:
    """Whether an operator writes to this stored tensor, as a training batch norm does to its statistics."""
    return node.op == "get_attr" and any(user.op != "output" and not is_pure(user) for user in node.users)


def _tells_zeros_apart(node: Node) -> bool:
    name = name_of(node)
    if name in _QUOTIENTS:
        return isinstance(argument(node, "other"), Node)
    if name == "pow.Tensor_Scalar":
        return bool(argument(node, "exponent") < 0)
    unknown = node.op == "call_function" and lookup(node.target) is None
    return unknown or name in _TELL_ZEROS_APART
