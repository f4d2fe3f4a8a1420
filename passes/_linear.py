"""Calls as kernels: what a convolution, linear layer, batch norm, multiplication, average pooling or padding multiplies
with, and chains of those."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from graphopt.fake import FakeTensor
from graphopt.ops import argument
from graphopt.passes._affine import Affine
from graphopt.passes._kernel import Kernel, Refused, Sizes, from_pool, scaling
from graphopt.passes._layers import CONVOLUTIONS, Layer, read_layer, spread
from graphopt.passes._merging import border_exact, compose
from graphopt.passes.fold_batch_norm import read_batch_norm
from graphopt.passes.fuse_affine import DIFFERENCES, NEGATIONS, PRODUCTS, QUOTIENTS, REVERSED, SUMS, read_affine
from graphopt.rewriter import Node, Rewriter

__all__ = ["POOLS", "Branch", "Step", "branch_to", "image_sizes", "is_layer", "read_step", "steps_to"]

aten = torch.ops.aten

_CONVOLVE = (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding, *CONVOLUTIONS,
)  # fmt: skip
_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
POOLS = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
_PADS = (aten.constant_pad_nd.default, aten.pad.default)
_ARITHMETIC = {*PRODUCTS, *QUOTIENTS, *SUMS, *DIFFERENCES, *REVERSED, *NEGATIONS}
_LONGEST = 16
"""Steps that a chain is followed back."""


@dataclass(frozen=True)
class Step:
    """One call: `kernel` takes the value of `source` to that of `node`. `layer` is the layer that it is, if any, whose
    weight nothing else uses; `trainable` whether a stored tensor in the kernel was."""

    node: Node
    source: Node
    kernel: Kernel
    layer: Layer | None = None
    trainable: bool = False

    @property
    def is_free(self) -> bool:
        """Whether the layer next to it can do its work: it costs nothing that could be saved."""
        return self.layer is None and self.node.target not in POOLS


@dataclass(frozen=True)
class Branch:
    """Steps after each other, first to last, and the one kernel that they are from `source` to their end.

    `stopped` says why what comes before them is not part of it; None where that is no step at all.
    """

    source: Node
    steps: tuple[Step, ...]
    kernel: Kernel
    stopped: str | None


def is_layer(node: Node) -> bool:
    """Whether a call is one of the layers that can be read as a kernel, or a transposed convolution."""
    return node.target in (*_CONVOLVE, *_TRANSPOSED, aten.linear.default)


def image_sizes(rw: Rewriter, node: Node) -> Sizes:
    """The sizes of a value [batch, channels, *sizes] behind its channels; None for a free one."""
    return [size if isinstance(size, int) else None for size in rw.fake(node).shape[2:]]


def read_step(rw: Rewriter, node: Node, axes: int, *, numbers: bool = True) -> Step | str | None:
    """The call as a kernel on `axes` convolved axes, 0 for linear layers on the last axis; why a layer or a batch norm
    is none; or None for everything else. Without `numbers` the kernel of a layer is on the meta device."""
    if node.op != "call_function" or not isinstance(rw.value(node), FakeTensor):
        return None
    if is_layer(node):
        return _layer(rw, node, axes, numbers=numbers)
    if node.target in POOLS:
        return _pool(rw, node) if rw.fake(node).dim() == axes + 2 else None
    if node.target in _PADS:
        return _pad(rw, node, axes)
    affine = None
    if node.target is aten.batch_norm.default:
        affine = read_batch_norm(rw, node)
    elif node.target in _ARITHMETIC:
        affine = read_affine(rw, node)
        if isinstance(affine, str):
            return None  # arithmetic between two values, or with what is no constant, is nobody's candidate
    return _affine(rw, affine, axes) if isinstance(affine, Affine) else affine


def _layer(rw: Rewriter, node: Node, axes: int, *, numbers: bool) -> Step | str:
    layer = read_layer(rw, node)
    if isinstance(layer, str):
        return layer
    if layer.transposed or node.target in _TRANSPOSED:
        return f"'{node.name}' is a transposed convolution"
    if layer.window != axes or (axes and rw.fake(node).dim() != axes + 2):
        return f"'{node.name}' slides along {layer.window} axes of {rw.fake(node).dim()}"
    weight, bias = rw.tensor(layer.weight), rw.tensor(layer.bias)
    assert weight is not None
    dtype = rw.fake(node).dtype
    if weight.dtype != dtype or rw.fake(layer.input).dtype != dtype or (bias is not None and bias.dtype != dtype):
        return f"'{node.name}' mixes dtypes"
    if not weight.numel():
        return f"the weight of '{node.name}' has no elements"
    why = _why_fixed(rw, layer)
    if why is not None:
        return why
    steps = [n for name in ("stride", "dilation") for n in (spread(node, name, axes) if axes else [])]
    pads = layer.pads(weight.shape[2:])
    if pads is None or not all(isinstance(step, int) for step in steps):
        return f"the stride, padding or dilation of '{node.name}' is no number"
    matrix = weight.t() if not axes and layer.weight_out == 1 else weight
    if not numbers:
        matrix, bias = matrix.to("meta"), None if bias is None else bias.to("meta")
    kernel = Kernel.of(matrix, bias, stride=steps[:axes], dilation=steps[axes:], padding=pads, groups=layer.groups)
    return Step(node, layer.input, kernel, layer, rw.params[str(layer.weight.target)].requires_grad)


def _why_fixed(rw: Rewriter, layer: Layer) -> str | None:
    """Why the tensors of a layer may not go into others."""
    for tensor, reader in ((layer.weight, layer.reader), (layer.bias, layer.call)):
        if tensor is None:
            continue
        if str(tensor.target) in rw.params.masks:
            return f"the mask of '{tensor.target}' keeps elements zero"
        why = rw.why_shared(tensor, reader)
        if why is not None:
            return why
    return None


def _affine(rw: Rewriter, affine: Affine, axes: int) -> Step | None:
    shape = rw.fake(affine.node).shape
    channel = 1 if axes else len(shape) - 1
    if affine.axis not in (None, channel) or (axes and len(shape) != axes + 2) or len(shape) < 2:
        return None
    count = shape[channel]
    if not isinstance(count, int) or not count:
        return None
    kernel = scaling(affine.scale.expand(count), affine.shift.expand(count) if affine.shift.any() else None, axes)
    return Step(affine.node, affine.source, kernel, trainable=affine.trainable)


def _pool(rw: Rewriter, node: Node) -> Step | str:
    source = argument(node, "self")
    size = spread(node, "kernel_size", rw.fake(node).dim() - 2)
    stride = spread(node, "stride", len(size)) if argument(node, "stride") else size
    padding = spread(node, "padding", len(size))
    channels = rw.fake(node).shape[1]
    if not all(isinstance(number, int) for number in (channels, *size, *stride, *padding)):
        return f"the kernel, stride or padding of '{node.name}' is no number"
    try:
        kernel = from_pool(
            channels,
            size,
            stride,
            padding,
            ceil_mode=argument(node, "ceil_mode"),
            count_include_pad=argument(node, "count_include_pad"),
            divisor=argument(node, "divisor_override", None),
            sizes=image_sizes(rw, source),
        )
    except Refused as why:
        return f"'{node.name}' is no convolution: {why.what}"
    return Step(node, source, kernel)


def _pad(rw: Rewriter, node: Node, axes: int) -> Step | None:
    """Zeros around an image are the padding of a kernel that returns its input."""
    source, pads, value = (argument(node, name) for name in ("self", "pad", "value"))
    if argument(node, "mode", "constant") != "constant" or value not in (None, 0):
        return None
    if not axes or rw.fake(node).dim() != axes + 2 or not all(isinstance(pad, int) for pad in pads):
        return None
    if min(pads, default=0) < 0 or any(pads[2 * axes :]):
        return None
    channels: Any = rw.fake(node).shape[1]
    if not isinstance(channels, int):
        return None
    flat = [*pads, *[0] * (2 * axes - len(pads))]
    pairs = [(flat[2 * axis], flat[2 * axis + 1]) for axis in reversed(range(axes))]
    ones = torch.ones(channels, 1, *[1] * axes)
    return Step(node, source, Kernel.of(ones, padding=pairs, groups=channels))


def steps_to(rw: Rewriter, node: Any, user: Node, axes: int) -> tuple[list[Step], str | None]:
    """The steps that lead to `node`, first to last, each read by the next only and the last by `user` only, and why
    what comes before them is none; None where it is no candidate at all."""
    steps: list[Step] = []
    while isinstance(node, Node) and node.op == "call_function" and len(steps) < _LONGEST:
        step = read_step(rw, node, axes)
        if not isinstance(step, Step):
            return steps, step
        others = [other.name for other in node.users if other is not user]
        if others:
            return steps, f"'{node.name}' is also used by '{others[0]}'"
        steps.insert(0, step)
        node, user = step.source, node
    return steps, None


def branch_to(rw: Rewriter, node: Node, user: Node, axes: int) -> Branch:
    """The longest stretch of steps that leads to `node` and is exactly one kernel; without steps the identity."""
    steps, stopped = steps_to(rw, node, user, axes)
    if not steps:
        channels = rw.fake(node).shape[1 if axes else -1]
        return Branch(node, (), scaling(torch.ones(int(channels), dtype=torch.float64), axes=axes), stopped)
    kernel, taken = steps[-1].kernel, 1
    for step in reversed(steps[:-1]):
        why = border_exact(step.kernel, kernel)
        if why is not None:
            stopped = f"'{steps[-taken].node.name}' cannot take in '{step.node.name}': {why}"
            break
        kernel, taken = compose(step.kernel, kernel), taken + 1
    return Branch(steps[-taken].source, tuple(steps[-taken:]), kernel, stopped)
