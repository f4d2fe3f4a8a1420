"""Folding of scales and shifts written as arithmetic into the layers around them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from graphopt.ops import argument
from graphopt.passes._affine import Affine, absorb
from graphopt.passes._stored import Stored, read_stored
from graphopt.rewriter import Node, Rewriter
from graphopt.transform import Contract, Pass

__all__ = ["FuseAffine", "read_affine"]

aten = torch.ops.aten

PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar, aten.multiply.Tensor, aten.multiply.Scalar)
QUOTIENTS = (
    aten.div.Tensor, aten.div.Scalar, aten.divide.Tensor, aten.divide.Scalar,
    aten.true_divide.Tensor, aten.true_divide.Scalar,
)  # fmt: skip
SUMS = (aten.add.Tensor, aten.add.Scalar)
DIFFERENCES = (aten.sub.Tensor, aten.sub.Scalar, aten.subtract.Tensor, aten.subtract.Scalar)
REVERSED = (aten.rsub.Tensor, aten.rsub.Scalar)
NEGATIONS = (aten.neg.default, aten.negative.default)


@dataclass(frozen=True)
class FuseAffine(Pass):
    """Fold multiplications and additions by constants or per-channel tensors into the layer next to them.

    What:
        x * c, x / c, x + c, x - c, c - x and -x next to a convolution or linear layer go into its weight and bias,
        where c is a number or a stored tensor with one value per channel: input normalisation, layer scale, a frozen
        batch norm written by hand.

    Algebra:
        y = s * x + t with s, t [C]. After a layer W[o] *= s[o], b = s * b + t; before one W[:, i] *= s[i],
        b += sum over i and taps of W[:, i] * t[i]. For groups and transposed convolutions see fold-batch-norm.

    When it applies:
        c is a number, a stored tensor, or computed from stored tensors alone (a reshaped parameter, rsqrt(var + eps)),
        and varies along the layer's channel axis only. A parameter must be used here only: folding it away would
        otherwise untie it. Left alone with the reason: another dtype, another axis, a tensor that widens x, zero
        padding after a shift, results that are not finite, layers that are shared, computed or used twice, and
        arithmetic between two operators neither of which is a layer.

    Safety:
        Exact: only the order of multiplications and sums changes. Computed in float64, stored in the weight's dtype.

    Cost:
        One pass over every folded weight.

    Source:
        Distributivity. Layer scale: Touvron et al., Going deeper with Image Transformers, arXiv:2103.17239.

    Example:
        >>> import torch, graphopt
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv = torch.nn.Conv2d(3, 8, 3)
        ...         self.gamma = torch.nn.Parameter(torch.rand(8, 1, 1))
        ...     def forward(self, x):
        ...         return self.conv(x / 127.5 - 1) * self.gamma
        >>> model = graphopt.capture(Net().eval(), (torch.randn(1, 3, 8, 8),))
        >>> fused, reports = graphopt.run(model, "fuse-affine")
        >>> [node.name for node in fused.graph.nodes if node.op == "call_function"]
        ['conv2d']
    """

    name: ClassVar[str] = "fuse-affine"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, rw: Rewriter) -> None:
        targets = (*PRODUCTS, *QUOTIENTS, *SUMS, *DIFFERENCES, *REVERSED, *NEGATIONS)
        absorb(rw, rw.find(*targets), read_affine)


def read_affine(rw: Rewriter, node: Node) -> Affine | str | None:
    """The call as an affine map; None when it has no stored operand, or two."""
    target = node.target
    if target in NEGATIONS:
        return _affine(rw, node, argument(node, "self"), None, -1.0, 0.0)
    left, right = argument(node, "self"), argument(node, "other")
    stored = [read_stored(rw, operand, node) for operand in (left, right)]
    if (stored[0] is None) == (stored[1] is None):
        return None
    source, constant, first = (right, stored[0], False) if stored[1] is None else (left, stored[1], True)
    if isinstance(constant, str):
        return constant
    assert constant is not None
    value = constant.value
    if target in PRODUCTS:
        return _affine(rw, node, source, constant, value, 0.0)
    if target in QUOTIENTS:
        return _affine(rw, node, source, constant, 1.0 / value, 0.0) if first else None
    alpha = argument(node, "alpha", 1)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        return "its alpha is no number"
    return _affine(rw, node, source, constant, *_sum(target, value, float(alpha), first))


def _sum(target: Any, value: torch.Tensor, alpha: float, first: bool) -> tuple[float, torch.Tensor]:
    """Scale and shift of a sum or difference with `value`; `first`: x is the first operand."""
    if target in SUMS:
        return (1.0, alpha * value) if first else (alpha, value)
    if target in DIFFERENCES:
        return (1.0, -alpha * value) if first else (-alpha, value)
    return (-alpha, value) if first else (1.0, -alpha * value)


def _affine(
    rw: Rewriter, node: Node, source: Any, constant: Stored | None, scale: Any, shift: Any
) -> Affine | str | None:
    """The map with [1] or [C] vectors, once broadcasting and dtypes are sure to leave x as it is."""
    made, given = rw.fake(node), rw.value(source)
    if not isinstance(given, torch.Tensor) or not made.dtype.is_floating_point:
        return None
    if given.dtype != made.dtype:
        return f"it makes {made.dtype} from {given.dtype}"
    if constant is not None and constant.dtype not in (None, made.dtype):
        return f"its tensor is {constant.dtype}, x is {made.dtype}"
    if tuple(map(str, given.shape)) != tuple(map(str, made.shape)):
        return "its tensor is wider than x"
    axis = constant.varies(made.dim()) if constant is not None else None
    if isinstance(axis, str):
        return axis
    vectors = [torch.as_tensor(value, dtype=torch.float64).flatten() for value in (scale, shift)]
    if not all(math.isfinite(float(vector.abs().amax())) for vector in vectors if vector.numel()):
        return "it multiplies or adds what is not finite"
    return Affine(node, source, axis, vectors[0], vectors[1], constant is not None and constant.trainable)
