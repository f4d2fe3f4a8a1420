"""Pooling, written as tensor expressions over windows so that ceil_mode, padding and dilation follow torch exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tvm import relax, te, tirx

from graphopt.backends.tvm.layout import Ordered, computed, ordered, plain, settled
from graphopt.backends.tvm.operators import extreme
from graphopt.backends.tvm.operators.normalize import mean_of
from graphopt.backends.tvm.registry import Call, Refused, converts, wide

aten = torch.ops.aten
op = relax.op


def _per_axis(value: int | Sequence[int], rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def _rank(call: Call) -> int:
    """Number of pooled axes, from the operator's name (`max_pool2d`, `adaptive_avg_pool1d`)."""
    name = str(call.node.target)
    return next(rank for rank in (1, 2, 3) if f"pool{rank}d" in name)


@converts(
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.max_pool3d.default,
    aten.max_pool2d_with_indices.default,
    aten.max_pool3d_with_indices.default,
    layout="any",
)
def max_pool(
    call: Call,
    self: Any,
    kernel_size: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Any:
    """The largest of each window; what lies outside counts as -inf."""
    rank = _rank(call)
    kernel = _per_axis(kernel_size, rank)
    steps = _per_axis(stride, rank) if stride else kernel
    pads, holes = _per_axis(padding, rank), _per_axis(dilation, rank)
    source = _cast(call, self)
    sizes = ordered(source).shape[-rank:]

    def element(read: Callable[..., Any]) -> Callable[..., Any]:
        window = [te.reduce_axis((0, k), "rk") for k in kernel]

        def largest(*at: Any) -> Any:
            lead, place = at[:-rank], at[-rank:]
            look = [i * s - p + k * d for i, s, p, k, d in zip(place, steps, pads, window, holes, strict=True)]
            inside = [check for i, size in zip(look, sizes, strict=True) for check in (i >= 0, i < size)]
            lowest = extreme.lowest(ordered(source).dtype)
            return extreme.largest(tirx.if_then_else(tirx.all(*inside), read(*lead, *look), lowest), axis=window)

        return largest

    result = computed(call, source, call.shape, element, "max_pool", anchor=True)
    return (result, None) if "indices" in str(call.node.target) else result


@converts(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default, layout="any")
def avg_pool(
    call: Call,
    self: Any,
    kernel_size: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """Sum of each window over its size: with the padding, but never beyond it, when `count_include_pad`."""
    rank = _rank(call)
    kernel = _per_axis(kernel_size, rank)
    steps = _per_axis(stride, rank) if stride else kernel
    pads = _per_axis(padding, rank)
    sizes = ordered(self).shape[-rank:]

    def bounds(axis: int, index: Any) -> tuple[Any, Any, Any]:
        start = index * steps[axis] - pads[axis]
        end = tirx.min(start + kernel[axis], sizes[axis] + pads[axis])
        counted = end - start if count_include_pad else tirx.min(end, sizes[axis]) - tirx.max(start, 0)
        return start, tirx.min(end, sizes[axis]), counted

    return _window_mean(call, self, kernel, bounds, divisor_override)


@converts(
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    aten._adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool3d.default,
    layout="any",
)
def adaptive_avg_pool(call: Call, self: Any, output_size: Any) -> Any:
    """Means over windows from floor(i in / out) to ceil((i + 1) in / out)."""
    rank = _rank(call)
    outputs = call.shape[-rank:]
    if all(isinstance(size, int) and size == 1 for size in outputs):
        return mean_over(call, _cast(call, self), rank)
    sizes = _static_spatial(self, rank)

    def bounds(axis: int, index: Any) -> tuple[Any, Any, Any]:
        start = tirx.floordiv(index * sizes[axis], outputs[axis])
        end = tirx.floordiv((index + 1) * sizes[axis] + outputs[axis] - 1, outputs[axis])
        return start, end, end - start

    return _window_mean(call, self, _longest(sizes, outputs), bounds, None)


@converts(aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default)
def adaptive_max_pool(call: Call, self: Any, output_size: Any) -> Any:
    rank = _rank(call)
    sizes, shape = _static_spatial(self, rank), call.shape
    outputs = shape[-rank:]

    def compute(x: te.Tensor) -> te.Tensor:
        window = [te.reduce_axis((0, k), "rk") for k in _longest(sizes, outputs)]

        def element(*at: Any) -> Any:
            source, inside = [], []
            for index, k, size, out in zip(at[-rank:], window, sizes, outputs, strict=True):
                source.append(tirx.floordiv(index * size, out) + k)
                inside.append(source[-1] < tirx.floordiv((index + 1) * size + out - 1, out))
            value = tirx.if_then_else(tirx.all(*inside), x(*at[:-rank], *source), extreme.lowest(str(x.dtype)))
            return extreme.largest(value, axis=window)

        return te.compute(shape, element, name="max_pool")

    return (call.compute(compute, call.cast(self, wide(call.dtype)), name="adaptive_max_pool"), None)


def _static_spatial(x: Any, rank: int) -> list[int]:
    sizes = ordered(x).shape[-rank:]
    if not all(isinstance(size, int) for size in sizes):
        raise Refused("adaptive pooling of a dynamic size to more than one pixel")
    return sizes


def _longest(sizes: list[int], outputs: list[int]) -> list[int]:
    """The longest adaptive window of each axis."""
    return [
        max(-(-(i + 1) * size // out) - i * size // out for i in range(out))
        for size, out in zip(sizes, outputs, strict=True)
    ]


def _window_mean(
    call: Call,
    x: Any,
    kernel: list[int],
    bounds: Callable[[int, Any], tuple[Any, Any, Any]],
    divisor: int | None,
) -> Any:
    """Sums of windows divided by their counts; `bounds(axis, index)` gives start, end (cut to the input) and count."""
    rank = len(kernel)

    def element(read: Callable[..., Any]) -> Callable[..., Any]:
        window = [te.reduce_axis((0, k), "rk") for k in kernel]

        def total(*at: Any) -> Any:
            look, inside = [], []
            for axis, (index, k) in enumerate(zip(at[-rank:], window, strict=True)):
                start, end, _ = bounds(axis, index)
                look.append(start + k)
                inside += [start + k >= 0, start + k < end]
            value = tirx.if_then_else(tirx.all(*inside), read(*at[:-rank], *look), tirx.const(0, dtype))
            return te.sum(value, axis=window)

        return total

    def mean(total: Any, *at: Any) -> Any:
        count: Any = 1 if divisor is None else divisor
        if divisor is None:
            for axis, index in enumerate(at[-rank:]):
                count = count * bounds(axis, index)[2]
        return total / tirx.Cast(dtype, tirx.convert(count))

    source = _cast(call, x)
    dtype = ordered(source).dtype
    return computed(call, source, call.shape, element, "avg_pool", finish=mean, anchor=True)


def mean_over(call: Call, x: Any, rank: int) -> Any:
    """Means over the last `rank` axes, which stay with size 1."""
    known = ordered(x)
    sizes = known.shape
    if not all(isinstance(size, int) for size in sizes[-rank:]):
        return mean_of(call, plain(call, x), range(len(sizes) - rank, len(sizes)))
    count = math.prod(sizes[-rank:])

    def element(read: Callable[..., Any]) -> Callable[..., Any]:
        window = [te.reduce_axis((0, size), "rk") for size in sizes[-rank:]]
        return lambda *at: te.sum(read(*at[:-rank], *window), axis=window)

    def mean(total: Any, *at: Any) -> Any:
        return total / tirx.const(count if count else math.nan, known.dtype)

    shape = [*sizes[:-rank], *[1] * rank]
    return computed(call, x, shape, element, "mean", finish=mean, anchor=True)


def _cast(call: Call, x: Any) -> Any:
    known = ordered(x)
    return settled(Ordered(call.cast(known.value, wide(call.dtype)), known.order))
