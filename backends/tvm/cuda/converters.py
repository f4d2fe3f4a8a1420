"""Converters of the operators that have GPU kernels, in place of those that prepare them for a CPU.

Weights stay in the model's dtype. Images lie channels-last, and the weights of convolutions with their channels
innermost, so that both are read along the depth of the product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from tvm import ir, relax, te, tirx

from graphopt.backends.tvm.cuda import specifications
from graphopt.backends.tvm.cuda.attention import attention_fits
from graphopt.backends.tvm.kernels.geometry import Window
from graphopt.backends.tvm.kernels.normalization import standardized
from graphopt.backends.tvm.kernels.strided import Strided
from graphopt.backends.tvm.layout import CHANNELS_LAST, Ordered, Padded, arranged, ordered, plain, reshaped, settled
from graphopt.backends.tvm.operators.attention import attention as any_attention
from graphopt.backends.tvm.operators.attention import same_size
from graphopt.backends.tvm.operators.convolution import convolution as any_convolution
from graphopt.backends.tvm.operators.linear import linear as any_linear
from graphopt.backends.tvm.operators.linear import matmul as any_matmul
from graphopt.backends.tvm.operators.normalize import layer_norm as any_layer_norm
from graphopt.backends.tvm.operators.transposed import per_axis, with_row
from graphopt.backends.tvm.registry import CONVERTERS, LAYOUTS, Call, Converter, precomputed, shape_of
from graphopt.backends.tvm.strided import strided

__all__ = ["GPU_CONVERTERS"]

aten = torch.ops.aten
op = relax.op

GPU_CONVERTERS: dict[Any, Converter] = dict(CONVERTERS)
"""The table of the CPU with the converters below in it."""

_FLOATS = ("float16", "bfloat16", "float32")
_LANES = 8
"""Numbers that are copied at once, of 16 bits; the depth of weights is padded to a multiple."""


def _converts(*overloads: Any) -> Callable[[Converter], Converter]:
    def register(function: Converter) -> Converter:
        LAYOUTS[function] = "any"
        GPU_CONVERTERS.update(dict.fromkeys(overloads, function))
        return function

    return register


@_converts(aten.conv1d.default, aten.conv2d.default)
def conv(
    call: Call,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    return convolution(call, input, weight, bias, stride, padding, dilation, False, 0, groups)


@_converts(aten.conv1d.padding, aten.conv2d.padding)
def conv_named_padding(
    call: Call,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: str = "valid",
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """`same` pads by dilation * (kernel - 1), the smaller half first."""
    kernel = [size if isinstance(size, int) else 1 for size in ordered(weight).shape[2:]]
    before = [0] * len(kernel)
    if padding == "same":
        before = [d * (k - 1) // 2 for d, k in zip(per_axis(dilation, len(kernel)), kernel, strict=True)]
    return convolution(call, input, weight, bias, stride, before, dilation, False, 0, groups)


@_converts(aten.convolution.default)
def convolution(
    call: Call,
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Any:
    """A convolution over images or sequences with a constant weight; others are converted as for a CPU."""
    if transposed or not _has_kernel(call, input, weight):
        settings = (stride, padding, dilation, transposed, output_padding, groups)
        return any_convolution(call, plain(call, input), plain(call, weight), plain(call, bias), *settings)
    rank = len(shape_of(weight)) - 2
    steps, pads, holes = (per_axis(step, rank) for step in (stride, padding, dilation))
    shape, x = call.shape, input
    if rank == 1:
        x, weight = reshaped(call, x, with_row(ordered(x).shape)), call.reshape(weight, with_row(shape_of(weight)))
        steps, pads, holes, shape = [1, *steps], [0, *pads], [1, *holes], with_row(shape)
    elif isinstance(x, Padded):
        pads, x = [b + p for b, p in zip(x.before, pads, strict=True)], x.inner
    sizes = (ordered(x).shape[2:], shape[2:], shape_of(weight)[2:], steps, pads, holes)
    result = _image_product(call, x, weight, Window(*((pair[0], pair[1]) for pair in sizes)), groups)
    if bias is not None:
        result = Ordered(call.emit(op.add(result.value, call.cast(plain(call, bias), "float32"))), result.order)
    return reshaped(call, result, call.shape) if rank == 1 else result


def _has_kernel(call: Call, x: Any, weight: Any) -> bool:
    """Whether the weight is a constant of a known type, and the image has a fixed size."""
    if isinstance(weight, Ordered) or not isinstance(weight, ir.GenericConst) or call.dtype not in _FLOATS:
        return False
    rank, image = len(shape_of(weight)) - 2, ordered(x)
    if rank not in (1, 2) or len(image.order) != rank + 2 or 0 in image.shape:
        return False
    same = image.dtype == str(weight.ty.dtype) == call.dtype
    return same and all(isinstance(size, int) for size in image.shape[1:])


def _image_product(call: Call, x: Any, weight: Any, window: Window, groups: int) -> Ordered:
    outputs, depth = shape_of(weight)[:2]
    if depth == 1 and outputs == groups:
        turned = precomputed(weight, lambda w: w[:, 0].permute(1, 2, 0))
        source = arranged(call, x, CHANNELS_LAST)
        result = call.compute(
            lambda d, w: specifications.depthwise(d, w, window), source, turned, name="depthwise", anchor=True
        )
        return Ordered(result, CHANNELS_LAST)
    packed = precomputed(weight, _packed)
    as_it_is = depth % _LANES != 0 and ordered(x).order == (0, 1, 2, 3)
    order = "NCHW" if as_it_is else "NHWC"
    source = ordered(x).value if as_it_is else arranged(call, x, CHANNELS_LAST)
    result = call.compute(
        lambda d, w: specifications.convolution(d, w, groups, window, order),
        source,
        packed,
        name="convolution",
        anchor=True,
    )
    return Ordered(result, CHANNELS_LAST)


def _packed(weight: torch.Tensor) -> torch.Tensor:
    """weight [out, in, KH, KW] to [out, KH * KW * in], padded with zeros to whole chunks."""
    flat = weight.permute(0, 2, 3, 1).flatten(1)
    return nn.functional.pad(flat, (0, -flat.shape[1] % _LANES))


@_converts(aten.linear.default)
def linear(call: Call, input: Any, weight: Any, bias: Any = None) -> Any:
    """input [..., in], weight [out, in], bias [out] -> [..., out]."""
    turned = ordered(weight)
    rows = ordered(input)
    if rows.order and rows.order[-1] != len(rows.order) - 1:
        rows = ordered(plain(call, input))
    if not rows.order or not _multiplies(call, rows, turned):
        return any_linear(call, plain(call, input), plain(call, weight), plain(call, bias))
    right = Ordered(turned.value, tuple(1 - axis for axis in turned.order))
    stored = ordered(rows.value)  # the rows may lie in any order: they are what they are in the result, too
    result = _product(call, stored, right, shape_of(rows.value)[:-1])
    if bias is not None:
        result = call.emit(op.add(result, call.cast(plain(call, bias), "float32")))
    return settled(Ordered(result, rows.order))


@_converts(aten.matmul.default, aten.mm.default, aten.bmm.default)
def matmul(call: Call, self: Any, other: Any = None, mat2: Any = None) -> Any:
    right = other if mat2 is None else mat2
    a, b = ordered(self), ordered(right)
    if not _multiplies(call, a, b) or min(len(a.order), len(b.order)) < 2:
        return any_matmul(call, plain(call, self), plain(call, right))
    return _product(call, a, b, call.sizes(call.meta)[:-1])


def _multiplies(call: Call, a: Ordered, b: Ordered) -> bool:
    """Whether both operands have the type of the result, and the depth and number of columns are fixed."""
    fixed = [a.shape[-1], *b.shape[-2:]]
    sizes = [*a.shape, *b.shape]
    return (
        a.dtype == b.dtype == call.dtype
        and call.dtype in _FLOATS
        and all(isinstance(size, int) for size in fixed)
        and 0 not in sizes
    )


def _product(call: Call, a: Ordered, b: Ordered, rows: list[Any]) -> Any:
    """a [..., M, K] times b [..., K, N]; `rows` are the sizes of the result without N."""
    if len(a.order) == 1:
        a, rows = Ordered(call.reshape(a.value, [1, *a.shape]), (0, 1)), [1]
    return call.compute(
        lambda x, y: specifications.matmul(x, a.order, y, b.order, rows[:-1]),
        a.value,
        b.value,
        name="matmul",
        anchor=True,
    )


@_converts(aten.layer_norm.default)
def layer_norm(
    call: Call,
    input: Any,
    normalized_shape: Sequence[Any],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    """Of rows in a short dtype: they are made float32 where they are read, so that no kernel writes them so."""
    known = ordered(input)
    short = known.dtype in ("float16", "bfloat16") and call.dtype == known.dtype
    width = known.shape[-1]
    if not short or len(normalized_shape) != 1 or not isinstance(width, int) or 0 in known.shape:
        return any_layer_norm(
            call, plain(call, input), normalized_shape, plain(call, weight), plain(call, bias), eps, cudnn_enable
        )
    rows = known if known.order[-1] == len(known.order) - 1 else ordered(plain(call, input))

    def compute(x: te.Tensor) -> te.Tensor:
        wide = te.compute(x.shape, lambda *at: tirx.Cast("float32", x(*at)), name="wide")
        return standardized(wide, eps, centred=True)

    result = call.compute(compute, rows.value, name="standardized", anchor=True)
    if weight is not None:
        result = call.emit(op.multiply(result, call.cast(plain(call, weight), "float32")))
    if bias is not None:
        result = call.emit(op.add(result, call.cast(plain(call, bias), "float32")))
    return settled(Ordered(result, rows.order))


@_converts(aten.scaled_dot_product_attention.default)
def attention(
    call: Call,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention in one kernel, where there is one for it; else two products and a softmax."""
    places = _places(call, [query, key, value, *([] if attn_mask is None else [attn_mask])])
    if places is None or dropout_p or enable_gqa or not _attends(call, places):
        masks = plain(call, attn_mask)
        tensors = [plain(call, x) for x in (query, key, value)]
        return any_attention(call, *tensors, masks, dropout_p, is_causal, scale, enable_gqa)
    rank = len(places[0].sizes)
    order = (*range(rank - 3), rank - 2, rank - 3, rank - 1) if rank > 2 else tuple(range(rank))
    factor = places[0].sizes[-1] ** -0.5 if scale is None else scale
    result = call.compute(
        lambda *x: specifications.attention(x, places, factor, causal=is_causal, order=order),
        *(place.value for place in places),
        name="attention",
        anchor=True,
    )
    return settled(Ordered(result, order))


def _places(call: Call, tensors: list[Any]) -> list[Strided] | None:
    """Where the operands lie; those whose rows are not whole chunks are copied."""
    places = []
    for number, tensor in enumerate(tensors):
        place = strided(call, ordered(tensor))
        if number < _OPERANDS and (place is None or not place.aligned(_LANES)):
            place = strided(call, ordered(plain(call, tensor)))
        if place is None:
            return None
        places.append(place)
    return places


def _attends(call: Call, places: list[Strided]) -> bool:
    """Whether there is a kernel for operands that lie like this."""
    (*q, _, width), (*k, _, _), (*v, keys, depth) = (place.sizes for place in places[:_OPERANDS])
    same = len(q) == len(k) == len(v) and all(
        same_size(a, b) for other in (k, v) for a, b in zip(q, other, strict=True)
    )
    dtypes = {str(place.value.ty.dtype) for place in places[:_OPERANDS]}
    known = attention_fits(width, depth, keys, call.dtype) and dtypes == {call.dtype}
    chunks = all(place.aligned(_LANES) for place in places[:_OPERANDS])
    return same and known and chunks and 0 not in places[0].sizes


_OPERANDS = 3
"""Query, key and value; a mask may follow them."""
