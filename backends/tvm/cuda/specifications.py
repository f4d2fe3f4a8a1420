"""What the GPU kernels compute, as tensor expressions. Products are summed in float32, whatever the operands are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tvm import te, tirx

from graphopt.backends.tvm.kernels.fused import ANCHOR
from graphopt.backends.tvm.kernels.geometry import Window
from graphopt.backends.tvm.kernels.matmul import leading
from graphopt.backends.tvm.kernels.strided import Strided

__all__ = ["attention", "convolution", "depthwise", "matmul"]


def convolution(data: te.Tensor, weight: te.Tensor, groups: int, window: Window, order: str) -> te.Tensor:
    """Data [N, H, W, C] (or [N, C, H, W] by `order`) and weight [out, depth] to float32 [N, OH, OW, out].

    The depth of the weight runs over rows, columns and channels of the window (the channels of one group); what is
    beyond them is padding, and not read.
    """
    channels = int(data.shape[order.index("C")]) // groups
    kh, kw = window.kernel
    outputs = int(weight.shape[0])
    y, x, k = te.reduce_axis((0, kh), "ky"), te.reduce_axis((0, kw), "kx"), te.reduce_axis((0, channels), "k")

    def element(n: Any, oy: Any, ox: Any, o: Any) -> Any:
        group = tirx.floordiv(o, outputs // groups)
        pixel = _pixel(data, window, order, (n, oy, ox, group * channels + k), (y, x))
        factor = tirx.Cast("float32", weight(o, (y * kw + x) * channels + k))
        return te.sum(tirx.Cast("float32", pixel) * factor, axis=[y, x, k])

    notes = {ANCHOR: "gpu.convolution", "graphopt.groups": groups, "graphopt.order": order, **window.notes()}
    return te.compute((data.shape[0], *window.result, outputs), element, name="convolution", attrs=notes)


def depthwise(data: te.Tensor, weight: te.Tensor, window: Window) -> te.Tensor:
    """Data [N, H, W, C] and weight [KH, KW, C] to float32 [N, OH, OW, C], each channel for itself."""
    y, x = (te.reduce_axis((0, size), name) for size, name in zip(window.kernel, ("ky", "kx"), strict=True))

    def element(n: Any, oy: Any, ox: Any, c: Any) -> Any:
        pixel = _pixel(data, window, "NHWC", (n, oy, ox, c), (y, x))
        return te.sum(tirx.Cast("float32", pixel) * tirx.Cast("float32", weight(y, x, c)), axis=[y, x])

    notes = {ANCHOR: "gpu.depthwise", **window.notes()}
    shape = (data.shape[0], *window.result, data.shape[3])
    return te.compute(shape, element, name="depthwise", attrs=notes)


def _pixel(data: te.Tensor, window: Window, order: str, at: Sequence[Any], tap: Sequence[Any]) -> Any:
    """The element of the image that the result at (n, y, x) sees at a tap, in channel c; zero outside the image."""
    n, oy, ox, c = at
    row = oy * window.stride[0] + tap[0] * window.dilation[0] - window.before[0]
    column = ox * window.stride[1] + tap[1] * window.dilation[1] - window.before[1]
    value = data(n, c, row, column) if order == "NCHW" else data(n, row, column, c)
    if not window.padded:
        return value
    (height, width) = window.size
    inside = tirx.all(row >= 0, row < height, column >= 0, column < width)
    return tirx.if_then_else(inside, value, tirx.const(0, data.dtype))


def matmul(
    left: te.Tensor, left_order: Sequence[int], right: te.Tensor, right_order: Sequence[int], lead: Sequence[Any]
) -> te.Tensor:
    """left [..., M, K] times right [..., K, N] to float32 [..., M, N], each operand stored in an order of its own.

    Args:
        lead: the leading sizes of the result; an operand may have fewer, or ones, and is repeated along them. The
            depth K is that of the left operand; a right one may be longer, padded.
    """
    sizes = [
        [tensor.shape[list(order).index(axis)] for axis in range(len(order))]
        for tensor, order in ((left, left_order), (right, right_order))
    ]
    k = te.reduce_axis((0, sizes[0][-1]), "k")

    def read(tensor: Any, order: Sequence[int], own: Sequence[Any], at: Sequence[Any]) -> Any:
        places = leading(own[:-2], at[:-2]) + list(at[-2:])
        return tirx.Cast("float32", tensor(*(places[axis] for axis in order)))

    def element(*at: Any) -> Any:
        *heads, m, n = at
        a = read(left, left_order, sizes[0], [*heads, m, k])
        return te.sum(a * read(right, right_order, sizes[1], [*heads, k, n]), axis=[k])

    orders = ",".join("".join(map(str, order)) for order in (left_order, right_order))
    notes = {ANCHOR: "gpu.matmul", "graphopt.orders": orders}
    return te.compute((*lead, sizes[0][-2], sizes[1][-1]), element, name="matmul", attrs=notes)


def attention(
    tensors: Sequence[te.Tensor], places: Sequence[Strided], scale: float, *, causal: bool, order: Sequence[int]
) -> te.Tensor:
    """softmax(query key^T scale + mask) value to float32 [..., L, V], stored in `order`.

    Query [..., L, E], key [..., S, E], value [..., S, V] and perhaps a mask that is repeated along axes of one element:
    booleans tell which scores count, numbers are added. Where none counts, the result is zero.

    Args:
        tensors: what holds the operands.
        places: where in these.
    """
    query, _, value = places[:3]
    *lead, length, width = query.sizes
    keys, depth = value.sizes[-2:]
    e, s = te.reduce_axis((0, width), "e"), te.reduce_axis((0, keys), "s")

    def read(number: int, at: Sequence[Any]) -> Any:
        return tirx.Cast("float32", places[number].element(tensors[number], at))

    def product(*at: Any) -> Any:
        *heads, place, j = at
        return te.sum(read(0, [*heads, place, e]) * read(1, [*heads, j, e]), axis=[e])

    products = te.compute((*lead, length, keys), product, name="products")
    scores = _scores(products, tensors[3:], places[3:], scale, causal=causal)
    weights = _weights(scores)

    def element(*stored: Any) -> Any:
        *heads, place, v = (stored[list(order).index(axis)] for axis in range(len(order)))
        return te.sum(weights(*heads, place, s) * read(2, [*heads, s, v]), axis=[s])

    shape = (*lead, length, depth)
    strides = ";".join(",".join(map(str, (place.offset, *place.strides))) for place in places)
    notes = {
        ANCHOR: "gpu.attention",
        "graphopt.scale": str(scale),
        "graphopt.causal": int(causal),
        "graphopt.order": "".join(map(str, order)),
        "graphopt.strides": strides,
        "graphopt.sizes": [int(size) for size in (width, keys, depth)],
    }
    return te.compute([shape[axis] for axis in order], element, name="attention", attrs=notes)


def _scores(
    products: te.Tensor, masks: Sequence[te.Tensor], places: Sequence[Strided], scale: float, *, causal: bool
) -> te.Tensor:
    """The products scaled and masked; minus infinity where a score does not count."""
    none = tirx.const(-math.inf, "float32")

    def masked(*at: Any) -> Any:
        score = products(*at) * tirx.const(scale, "float32")
        if causal:
            score = tirx.Select(at[-1] <= at[-2], score, none)
        for mask, place in zip(masks, places, strict=True):
            entry = place.element(mask, at[len(at) - len(place.sizes) :])
            boolean = str(mask.dtype) == "bool"
            score = tirx.Select(entry, score, none) if boolean else score + tirx.Cast("float32", entry)
        return score

    return te.compute(products.shape, masked, name="scores")


def _weights(scores: te.Tensor) -> te.Tensor:
    """The softmax along the last axis; zero where no score counts."""
    *lead, keys = scores.shape
    j, i = te.reduce_axis((0, keys), "j"), te.reduce_axis((0, keys), "i")
    none, zero = tirx.const(-math.inf, "float32"), tirx.const(0, "float32")
    peak = te.compute(lead, lambda *at: te.max(scores(*at, j), axis=[j]), name="peak")
    total = te.compute(lead, lambda *at: te.sum(tirx.exp(scores(*at, i) - peak(*at)), axis=[i]), name="total")

    def weight(*at: Any) -> Any:
        share = tirx.exp(scores(*at) - peak(*at[:-1])) / total(*at[:-1])
        return tirx.Select(peak(*at[:-1]) == none, zero, share)

    return te.compute(scores.shape, weight, name="weights")
