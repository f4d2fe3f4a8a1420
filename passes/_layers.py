"""Layers: calls that multiply their input by a stored weight, and the channels of that weight.

Axis 0 of a convolution's weight counts the channels of all groups (outputs; inputs of a transposed convolution), axis 1
those of one group. A matrix is the case of one group, so both are scaled alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from graphopt.ops import Contracted, argument, lookup
from graphopt.rewriter import Node, Rewriter

__all__ = ["Layer", "read_layer", "scaled", "summed"]

aten = torch.ops.aten

_ROLES = {"placeholder": "an input", "output": "the output", "get_attr": "a stored tensor"}
_BOTH_AXES = ({0, 1}, {-1, -2}, {0, -1}, {1, -2})
CONVOLUTIONS = (aten.convolution.default, aten._convolution.default)


@dataclass(frozen=True)
class Layer:
    """One layer: `y = beta * bias + alpha * (x @ weight)`, the product being a convolution too.

    `input_axis` and `output_axis` are the channel axes of x and y, never negative; `weight_in` and `weight_out`
    (0 or 1) the stored weight's. `reader` is what reads that: the call, or a transposition in between. `window` is the
    number of convolved axes, 0 of a matrix. The names are the schema's; `bias_name` is None for an operator that takes
    no bias.
    """

    call: Node
    input: Node
    weight: Node
    reader: Node
    bias: Node | None
    input_axis: int
    output_axis: int
    weight_in: int
    weight_out: int
    window: int
    groups: int
    input_name: str
    bias_name: str | None
    alpha: float = 1.0
    beta: float = 1.0

    @property
    def transposed(self) -> bool:
        return self.window > 0 and self.weight_in == 0

    def channels(self, shape: torch.Size, weight_axis: int) -> int:
        """Channels of the input (`weight_axis` is `weight_in`) or of the output (`weight_out`), over all groups."""
        return shape[weight_axis] * (self.groups if weight_axis == 1 else 1)

    def pads(self, kernel: torch.Size) -> list[tuple[int, int]] | None:
        """Zeros before and after each convolved axis; None where a pad is no number, or for a transposed layer."""
        if not self.window:
            return []
        padding = argument(self.call, "padding")
        if padding == "valid":
            return [(0, 0)] * self.window
        if padding == "same":
            totals = [d * (k - 1) for d, k in zip(spread(self.call, "dilation", self.window), kernel, strict=True)]
            return [(total // 2, total - total // 2) for total in totals]
        sizes = spread(self.call, "padding", self.window)
        if self.transposed or not all(isinstance(size, int) for size in sizes):
            return None
        return [(size, size) for size in sizes]

    def is_pointwise(self, kernel: torch.Size) -> bool:
        """Whether every output position reads just the input position at its place."""
        ones = [*kernel, *spread(self.call, "stride", self.window)]
        zeros = spread(self.call, "padding", self.window)
        if self.transposed:
            zeros = [*zeros, *spread(self.call, "output_padding", self.window)]
        return all(size == 1 for size in ones) and all(size == 0 for size in zeros)


def spread(call: Node, name: str, count: int) -> list[Any]:
    """An argument with one value per convolved axis; one value stands for all of them."""
    values = list(argument(call, name))
    return values * count if len(values) == 1 else values


def read_layer(rw: Rewriter, call: Any) -> Layer | str:
    """The layer that `call` is, or why it is none that could be changed."""
    if not isinstance(call, Node) or call.op != "call_function":
        return f"'{call}' is {_ROLES.get(getattr(call, 'op', ''), 'no node')}, not a layer"
    layer = _describe(rw, call)
    if layer is None:
        return f"'{call.name}' ({call.target}) is no layer with a weight"
    weight = rw.tensor(layer.weight)
    if weight is None:
        return f"the weight of '{call.name}' is computed"
    if layer.bias is not None and rw.tensor(layer.bias) is None:
        return f"the bias of '{call.name}' is computed"
    if len({layer.input, layer.weight, layer.bias}) < 3:
        return f"'{call.name}' uses one tensor twice"
    if weight.device.type == "meta":
        return f"the weight of '{call.name}' has no data"
    if not weight.dtype.is_floating_point or weight.ndim != 2 + layer.window:
        return f"the weight of '{call.name}' is {weight.dtype} of {weight.ndim} axes"
    return layer


def _describe(rw: Rewriter, call: Node) -> Layer | None:
    info = lookup(call.target)
    if call.target in CONVOLUTIONS:
        window = rw.fake(argument(call, "weight")).dim() - 2
        axes = (1, 0) if argument(call, "transposed") else (0, 1)
        return _contracted(rw, call, -1 - window, axes, window)
    if info is not None and isinstance(info.axes, Contracted):
        axes = (info.axes.weight_out, info.axes.weight_in)
        return _contracted(rw, call, info.axes.input_axis, axes, info.axes.window)
    if call.target is aten.addmm.default:
        return _matrix(rw, call, "mat1", "mat2", "self")
    if call.target is aten.mm.default:
        return _matrix(rw, call, "self", "mat2", None)
    if call.target is aten.matmul.default and rw.fake(argument(call, "self")).dim() >= 2:
        return _matrix(rw, call, "self", "other", None)
    return None


def _contracted(rw: Rewriter, call: Node, axis: int, weight_axes: tuple[int, int], window: int) -> Layer:
    """A linear layer or a convolution; both channel axes are `axis`, counted from the end."""
    rank = rw.fake(call).dim()
    weight, reader = _stored_weight(argument(call, "weight"), call)
    weight_out, weight_in = weight_axes if reader is call else weight_axes[::-1]
    return Layer(
        call=call,
        input=argument(call, "input"),
        weight=weight,
        reader=reader,
        bias=argument(call, "bias"),
        input_axis=axis % rank,
        output_axis=axis % rank,
        weight_in=weight_in,
        weight_out=weight_out,
        window=window,
        groups=argument(call, "groups") if window else 1,
        input_name="input",
        bias_name="bias",
    )


def _stored_weight(weight: Node, call: Node) -> tuple[Node, Node]:
    """The tensor behind a matrix that is transposed for `call` alone, and its reader; else both as they are."""
    swaps = weight.op == "call_function" and (
        weight.target is aten.t.default
        or (weight.target is aten.transpose.int and {argument(weight, "dim0"), argument(weight, "dim1")} in _BOTH_AXES)
        or (weight.target is aten.permute.default and list(argument(weight, "dims")) == [1, 0])
    )
    if swaps and list(weight.users) == [call]:
        return argument(weight, "self"), weight
    return weight, call


def _matrix(rw: Rewriter, call: Node, input_name: str, weight_name: str, bias_name: str | None) -> Layer | None:
    """A product with a weight [in, out]."""
    alpha, beta = (argument(call, name) if bias_name else 1 for name in ("alpha", "beta"))
    if not isinstance(alpha, int | float) or not isinstance(beta, int | float):
        return None
    last = rw.fake(call).dim() - 1
    weight, reader = _stored_weight(argument(call, weight_name), call)
    return Layer(
        call=call,
        input=argument(call, input_name),
        weight=weight,
        reader=reader,
        bias=argument(call, bias_name) if bias_name else None,
        input_axis=last,
        output_axis=last,
        weight_in=0 if reader is call else 1,
        weight_out=1 if reader is call else 0,
        window=0,
        groups=1,
        input_name=input_name,
        bias_name=bias_name,
        alpha=float(alpha),
        beta=float(beta),
    )


def scaled(weight: torch.Tensor, axis: int, factor: torch.Tensor, groups: int) -> torch.Tensor:
    """Weight [n0, n1, *kernel] times one factor per channel of `axis`, all groups counted: [n0] or [groups * n1]."""
    trailing = [1] * (weight.ndim - 2)
    if axis == 0:
        return weight * factor.reshape(weight.shape[0], 1, *trailing)
    first, second = weight.shape[:2]
    by_group = weight.reshape(groups, first // groups, *weight.shape[1:])
    return (by_group * factor.reshape(groups, 1, second, *trailing)).reshape(weight.shape)


def summed(weight: torch.Tensor, weight_out: int, groups: int) -> torch.Tensor:
    """Weight [n0, n1, *kernel] summed over all but its output channels: [outputs of all groups]."""
    flat = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
    if weight_out == 0:
        return flat.sum(1)
    return flat.reshape(groups, flat.shape[0] // groups, flat.shape[1]).sum(1).flatten()
