"""Convolutions and linear layers with constant float32 weights, as specifications that kernels replace.

Weights are packed here, once, while compiling.
"""

from __future__ import annotations

from typing import Any

import torch
from tvm import ir, relax, te

from graphopt.backends.tvm.kernels.convolution import convolution
from graphopt.backends.tvm.kernels.depthwise import depthwise
from graphopt.backends.tvm.kernels.geometry import Window
from graphopt.backends.tvm.kernels.product import packed_vectors, product
from graphopt.backends.tvm.kernels.strassen import BACK, quarters, strassen, strassen_pays
from graphopt.backends.tvm.kernels.transforms import SQUARES
from graphopt.backends.tvm.kernels.winograd import best_square, transformed_weight, winograd
from graphopt.backends.tvm.layout import CHANNELS_LAST, Ordered, arranged, ordered
from graphopt.backends.tvm.registry import Call, precomputed, shape_of

__all__ = ["packed_convolution", "packed_linear", "packs"]

_FEW_CHANNELS = 4
"""An image of so few channels is read as it is: its axes are moved where its rows are copied."""


def packs(call: Call, weight: Any, x: Any) -> bool:
    """Whether there are kernels for this weight and input: constants in float32, and an image of fixed size."""
    if not call.machine.lanes:  # a GPU
        return False
    if call.dtype != "float32" or not isinstance(weight, ir.GenericConst) or str(weight.ty.dtype) != "float32":
        return False
    spatial = ordered(x).shape[2:] if len(weight.ty.shape) > 2 else []
    return ordered(x).dtype == "float32" and all(isinstance(size, int) for size in [*spatial, *shape_of(weight)])


def packed_linear(call: Call, x: Any, weight: Any) -> Any:
    """x [..., in] times weight [out, in] transposed."""
    (columns, depth), lanes = shape_of(weight), call.machine.lanes
    if not call.machine.exact and strassen_pays(shape_of(x), depth, columns, call.machine):
        sums, back = precomputed(weight, lambda w: quarters(w, lanes)), relax.const(BACK, "float32")
        return call.compute(lambda d, w, b: strassen(d, w, b, columns), x, sums, back, name="strassen", anchor=True)
    lanes = call.machine.lanes_for(columns)
    packed = precomputed(weight, lambda w: _packed(w[:, None, None, :], 1, lanes)[:, 0, 0])
    return call.compute(lambda d, w: product(d, w, columns), x, packed, name="linear", anchor=True)


def packed_convolution(call: Call, x: Any, weight: Any, window: Window, groups: int) -> Any:
    """x [N, C, H, W] and weight [out, C / groups, KH, KW] to [N, out, OH, OW], stored channels-last."""
    outputs, depth = shape_of(weight)[:2]
    lanes = call.machine.lanes
    channels = depth * groups
    if depth == 1 and outputs == groups and groups >= lanes:
        turned = precomputed(weight, lambda w: w[:, 0].permute(1, 2, 0))
        source = arranged(call, x, CHANNELS_LAST)
        result = call.compute(lambda d, w: depthwise(d, w, window), source, turned, name="depthwise", anchor=True)
        return Ordered(result, CHANNELS_LAST)
    if window.kernel == (1, 1) and not window.padded and groups == 1:
        source = _every(call, arranged(call, x, CHANNELS_LAST), window)
        matrix = precomputed(weight, lambda w: w[:, :, 0, 0])
        return Ordered(packed_linear(call, source, matrix), CHANNELS_LAST)
    if groups == 1 and window.kernel == (3, 3) and window.stride == window.dilation == (1, 1):
        square = 0 if call.machine.exact else best_square(window, channels, outputs, call.machine)
        if square:
            return _winograd(call, arranged(call, x, CHANNELS_LAST), weight, window, square)
    lanes = call.machine.lanes_for(outputs // groups)
    if groups > 1 and outputs // groups < lanes:
        weight, groups = _merged(weight, groups, lanes)
    packed = precomputed(weight, lambda w: _packed(w.permute(0, 2, 3, 1), groups, lanes))
    as_it_is = channels <= _FEW_CHANNELS and ordered(x).order == (0, 1, 2, 3)
    order = "NCHW" if as_it_is else "NHWC"
    source = ordered(x).value if as_it_is else arranged(call, x, CHANNELS_LAST)

    def compute(data: te.Tensor, w: te.Tensor) -> te.Tensor:
        return convolution(data, w, outputs, groups, window, order)

    return Ordered(call.compute(compute, source, packed, name="convolution", anchor=True), CHANNELS_LAST)


def _winograd(call: Call, source: Any, weight: Any, window: Window, square: int) -> Ordered:
    outputs = shape_of(weight)[0]
    lanes = call.machine.lanes_for(outputs)

    def packed(w: torch.Tensor) -> torch.Tensor:
        positions = transformed_weight(w, square)
        return torch.stack([_packed(p[:, None, None, :], 1, lanes)[:, 0, 0] for p in positions])

    back = relax.const(SQUARES[square].back.astype("float32"), "float32")
    result = call.compute(
        lambda d, w, b: winograd(d, w, b, outputs, square, window),
        source,
        precomputed(weight, packed),
        back,
        name="winograd",
        anchor=True,
    )
    return Ordered(result, CHANNELS_LAST)


def _every(call: Call, x: Any, window: Window) -> Any:
    """The pixels [N, OH, OW, C] that a 1x1 window looks at, next to one another as the rows of a product are."""
    if window.stride == (1, 1):
        return x
    (down, right), sizes = window.stride, window.result

    def picked(data: te.Tensor) -> te.Tensor:
        shape = (data.shape[0], *sizes, data.shape[3])
        return te.compute(shape, lambda n, i, j, c: data(n, i * down, j * right, c), name="picked")

    return call.compute(picked, x, name="pick")


def _packed(weight: torch.Tensor, groups: int, lanes: int) -> torch.Tensor:
    """weight [out, KH, KW, in] in vectors of outputs: [groups * vectors, KH, KW, in, lanes]."""
    per_group = len(weight) // groups
    vectors = []
    for group in weight.split(per_group):
        for start in packed_vectors(per_group, lanes):
            part = group[start : start + lanes].permute(1, 2, 3, 0)
            vectors.append(torch.nn.functional.pad(part, (0, lanes - part.shape[-1])))
    return torch.stack(vectors)


def _merged(weight: Any, groups: int, lanes: int) -> tuple[Any, int]:
    """Fewer, wider groups: neighbours become one group whose weight is zero where they do not meet.

    A vector of outputs must not span groups; the zeros cost less than empty lanes.
    """
    outputs, depth = shape_of(weight)[:2]
    per_group = outputs // groups
    merged = next(m for m in range(1, groups + 1) if groups % m == 0 and (m * per_group >= lanes or m == groups))

    def widen(w: torch.Tensor) -> torch.Tensor:
        wide = w.new_zeros(outputs, merged, depth, *w.shape[2:])
        for output in range(outputs):
            wide[output, output // per_group % merged] = w[output]
        return wide.flatten(1, 2)

    return precomputed(weight, widen), groups // merged
