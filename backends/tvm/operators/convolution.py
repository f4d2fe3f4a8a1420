"""Convolutions of one, two and three dimensions, grouped and transposed, as one tensor expression each."""

from __future__ import annotations

from typing import Any

import torch
from tvm import relax, te, tirx

from graphopt.backends.tvm.kernels.geometry import Window
from graphopt.backends.tvm.layout import Ordered, Padded, ordered, plain, reshaped
from graphopt.backends.tvm.operators.packed import packed_convolution, packs
from graphopt.backends.tvm.operators.transposed import per_axis, transposed_with_kernel, with_row
from graphopt.backends.tvm.registry import Call, Refused, converts, shape_of, static_shape, wide

aten = torch.ops.aten
op = relax.op


@converts(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, layout="any")
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
    """input [N, C, ...], weight [out, in / groups, ...]; cross-correlation."""
    return convolution(call, input, weight, bias, stride, padding, dilation, False, 0, groups)


@converts(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding, layout="any")
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
    weight = plain(call, weight)
    rank = len(shape_of(weight)) - 2
    kernel = static_shape(weight, "the convolution's weight")[2:]
    before = [0] * rank
    if padding == "same":
        before = [d * (k - 1) // 2 for d, k in zip(per_axis(dilation, rank), kernel, strict=True)]
    return convolution(call, input, weight, bias, stride, before, dilation, False, 0, groups)


@converts(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input, layout="any")
def conv_transpose(
    call: Call,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    """input [N, C, ...], weight [in, out / groups, ...]."""
    return convolution(call, input, weight, bias, stride, padding, dilation, True, output_padding, groups)


@converts(aten.convolution.default, layout="any")
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
    """Any convolution. The padding at the far end is whatever the shape that torch infers asks for."""
    dtype = wide(call.dtype)
    weight, bias = plain(call, weight), plain(call, bias)
    rank = len(shape_of(weight)) - 2
    if not transposed and packs(call, weight, input) and rank in (1, 2) and len(ordered(input).order) == rank + 2:
        return _with_kernel(call, input, weight, bias, (stride, padding, dilation), groups)
    if transposed and rank in (1, 2) and packs(call, weight, input) and len(ordered(input).order) == rank + 2:
        return transposed_with_kernel(call, input, weight, bias, (stride, padding, dilation), groups)
    x, w = call.cast(plain(call, input), dtype), call.cast(weight, dtype)
    result_shape = call.shape
    unbatched = len(shape_of(x)) == rank + 1
    if unbatched:
        x, result_shape = call.reshape(x, [1, *shape_of(x)]), [1, *call.shape]
    static_shape(w, "the convolution's weight")
    steps, pads, holes = (per_axis(value, rank) for value in (stride, padding, dilation))
    if transposed:
        result = _transposed(call, x, w, steps, pads, holes, groups, result_shape)
    else:
        result = _direct(call, x, w, steps, pads, holes, groups, result_shape)
    if bias is not None:
        channels = result_shape[1]
        result = call.emit(op.add(result, call.reshape(call.cast(bias, dtype), [1, channels] + [1] * rank)))
    return call.reshape(result, call.shape) if unbatched else result


def _with_kernel(call: Call, x: Any, weight: Any, bias: Any, steps: tuple[Any, Any, Any], groups: int) -> Any:
    """A convolution over images; over sequences, it is one over images of one row."""
    rank = len(shape_of(weight)) - 2
    stride, padding, dilation = (per_axis(step, rank) for step in steps)
    shape = call.shape
    if rank == 1:
        x, weight = reshaped(call, x, with_row(ordered(x).shape)), call.reshape(weight, with_row(shape_of(weight)))
        stride, padding, dilation, shape = [1, *stride], [0, *padding], [1, *dilation], with_row(shape)
    elif isinstance(x, Padded):
        padding, x = [b + p for b, p in zip(x.before, padding, strict=True)], x.inner
    size, kernel = ordered(x).shape[2:], shape_of(weight)[2:]
    window = Window(*((pair[0], pair[1]) for pair in (size, shape[2:], kernel, stride, padding, dilation)))
    result = packed_convolution(call, x, weight, window, groups)
    if bias is not None:
        result = Ordered(call.emit(op.add(result.value, bias)), result.order)
    return reshaped(call, result, call.shape) if rank == 1 else result


def _direct(
    call: Call, x: Any, w: Any, stride: list[int], pad: list[int], hole: list[int], groups: int, shape: list[Any]
) -> Any:
    kernel = shape_of(w)[2:]
    extents = [(size - 1) * s + d * (k - 1) + 1 for size, s, d, k in zip(shape[2:], stride, hole, kernel, strict=True)]

    def compute(data: te.Tensor, weight: te.Tensor) -> te.Tensor:
        source = _padded(data, pad, extents) if any(pad) else data
        return _correlate(source, weight, stride, hole, groups, shape)

    return call.compute(compute, x, w, name="conv")


def _transposed(
    call: Call, x: Any, w: Any, stride: list[int], pad: list[int], hole: list[int], groups: int, shape: list[Any]
) -> Any:
    """Put stride - 1 zeros between the pixels, pad, then correlate with the kernel turned around."""
    kernel = shape_of(w)[2:]
    before = [d * (k - 1) - p for d, k, p in zip(hole, kernel, pad, strict=True)]
    extents = [size + d * (k - 1) for size, d, k in zip(shape[2:], hole, kernel, strict=True)]
    inputs, outputs = shape_of(w)[0], shape_of(w)[1]

    def turned(weight: te.Tensor) -> te.Tensor:
        def element(o: Any, i: Any, *k: Any) -> Any:
            back = [size - 1 - index for size, index in zip(kernel, k, strict=True)]
            return weight(o // outputs * (inputs // groups) + i, o % outputs, *back)

        return te.compute((outputs * groups, inputs // groups, *kernel), element, name="turned")

    flipped = call.compute(turned, w, name="turn_kernel")

    def compute(data: te.Tensor, weight: te.Tensor) -> te.Tensor:
        source = _padded(data, before, extents, stride)
        return _correlate(source, weight, [1] * len(kernel), hole, groups, shape)

    return call.compute(compute, x, flipped, name="conv_transpose")


def _padded(data: te.Tensor, before: list[int], extents: list[Any], spread: list[int] | None = None) -> te.Tensor:
    """`data` with zeros around it, `spread - 1` zeros between its pixels, cut to `extents`."""
    steps = spread or [1] * len(before)
    sizes = list(data.shape)[2:]

    def element(n: Any, c: Any, *at: Any) -> Any:
        inside, source = [], []
        for index, low, step, size in zip(at, before, steps, sizes, strict=True):
            shifted = index - low
            inside += [shifted >= 0, shifted < (size - 1) * step + 1]
            inside += [tirx.floormod(shifted, step) == 0] if step > 1 else []
            source.append(tirx.floordiv(shifted, step) if step > 1 else shifted)
        return tirx.if_then_else(tirx.all(*inside), data(n, c, *source), tirx.const(0, data.dtype))

    return te.compute((data.shape[0], data.shape[1], *extents), element, name="pad")


def _correlate(
    source: te.Tensor, weight: te.Tensor, stride: list[int], hole: list[int], groups: int, shape: list[Any]
) -> te.Tensor:
    outputs, inputs, *kernel = (int(size) for size in weight.shape)
    if outputs % groups:
        raise Refused(f"{outputs} output channels do not divide into {groups} groups")
    rc = te.reduce_axis((0, inputs), "rc")
    rk = [te.reduce_axis((0, size), f"rk{axis}") for axis, size in enumerate(kernel)]
    per_group = outputs // groups

    def channel(o: Any) -> Any:
        if groups == 1:
            return rc
        first = o if per_group == 1 else o // per_group
        return first if inputs == 1 else first * inputs + rc

    def element(n: Any, o: Any, *at: Any) -> Any:
        place = [i * s + k * d for i, s, k, d in zip(at, stride, rk, hole, strict=True)]
        return te.sum(source(n, channel(o), *place) * weight(o, rc, *rk), axis=[rc, *rk])

    return te.compute(shape, element, name="conv")
