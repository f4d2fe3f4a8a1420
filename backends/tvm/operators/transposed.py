"""Transposed convolution as an ordinary one.

With a stride of s, the outputs at s neighbouring places look at the same inputs, with different taps of the window.
So all of them are computed at once, as s times as many channels of a convolution of stride one whose window holds the
taps of each (Shi et al., "Is the deconvolution layer the same as a convolutional layer?", 2016), and the channels are
then laid out as pixels. Nothing is multiplied with zeros between pixels; a window that is no multiple of the stride
leaves some taps empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tvm import relax

from graphopt.backends.tvm.kernels.geometry import Window
from graphopt.backends.tvm.layout import Ordered, ordered, reshaped
from graphopt.backends.tvm.operators.movement import moved
from graphopt.backends.tvm.operators.packed import packed_convolution
from graphopt.backends.tvm.registry import Call, precomputed, shape_of

__all__ = ["per_axis", "transposed_with_kernel", "with_row"]

op = relax.op


def per_axis(value: int | Sequence[int], rank: int) -> list[int]:
    """A stride or the like for every axis; one number stands for all."""
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def with_row(shape: Sequence[Any]) -> list[Any]:
    """The shape of a sequence [N, C, L] as an image of one row."""
    return [*shape[:2], 1, *shape[2:]]


def transposed_with_kernel(call: Call, x: Any, weight: Any, bias: Any, steps: tuple[Any, Any, Any], groups: int) -> Any:
    """x [N, C, ...] and a constant weight [C, out / groups, ...], in one or two dimensions."""
    rank, shape = len(shape_of(weight)) - 2, call.shape
    stride, padding, dilation = (per_axis(step, rank) for step in steps)
    if rank == 1:
        x, weight = reshaped(call, x, with_row(ordered(x).shape)), call.reshape(weight, with_row(shape_of(weight)))
        stride, padding, dilation, shape = [1, *stride], [0, *padding], [1, *dilation], with_row(shape)
    kernel, size = shape_of(weight)[2:], ordered(x).shape[2:]
    spans = [_offsets(*axis) for axis in zip(kernel, stride, padding, dilation, strict=True)]
    taps = [high - low + 1 for low, high in spans]
    places = [-(-length // step) for length, step in zip(shape[2:], stride, strict=True)]
    before = [-low for low, _ in spans]

    def gathered(w: torch.Tensor) -> torch.Tensor:
        return _taps_of_places(w, groups, stride, padding, dilation, before, taps)

    window = Window(*((pair[0], pair[1]) for pair in (size, places, taps, (1, 1), before, (1, 1))))
    result = packed_convolution(call, x, precomputed(weight, gathered), window, groups)
    if bias is not None:
        repeated = [groups, stride[0] * stride[1], -1]
        wide = precomputed(bias, lambda b: b.reshape(groups, 1, -1).expand(repeated).flatten())
        result = Ordered(call.emit(op.add(result.value, wide)), result.order)
    pixels = _as_pixels(call, result, shape, stride, groups)
    return reshaped(call, pixels, call.shape) if rank == 1 else pixels


def _offsets(kernel: int, stride: int, padding: int, dilation: int) -> tuple[int, int]:
    """The first and the last input, counted from q, that the outputs q * stride ... q * stride + stride - 1 look at."""
    reached = [
        (place + padding - tap * dilation) // stride
        for place in range(stride)
        for tap in range(kernel)
        if (place + padding - tap * dilation) % stride == 0
    ]
    return min(reached, default=0), max(reached, default=0)


def _taps_of_places(
    weight: torch.Tensor,
    groups: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    before: Sequence[int],
    taps: Sequence[int],
) -> torch.Tensor:
    """weight [C, out / groups, KH, KW] to [groups * sy * sx * out / groups, C / groups, taps y, taps x]."""
    inputs, outputs, *kernel = weight.shape
    grouped = weight.reshape(groups, inputs // groups, outputs, *kernel)
    wide = weight.new_zeros(groups, *stride, outputs, inputs // groups, *taps)
    for y, x in ((y, x) for y in range(kernel[0]) for x in range(kernel[1])):
        for row, column in ((row, column) for row in range(stride[0]) for column in range(stride[1])):
            far = row + padding[0] - y * dilation[0], column + padding[1] - x * dilation[1]
            if far[0] % stride[0] == 0 and far[1] % stride[1] == 0:
                tap = far[0] // stride[0] + before[0], far[1] // stride[1] + before[1]
                wide[:, row, column, :, :, tap[0], tap[1]] = grouped[..., y, x].transpose(1, 2)
    return wide.reshape(-1, inputs // groups, *taps)


def _as_pixels(call: Call, result: Ordered, shape: Sequence[Any], stride: Sequence[int], groups: int) -> Any:
    """[N, groups * sy * sx * out, Q, P], each channel of a pixel's place, to [N, groups * out, sy * Q, sx * P]."""
    if list(stride) == [1, 1]:
        return result
    per_group = shape[1] // groups

    def source(at: list[Any]) -> list[Any]:
        n, channel, row, column = at
        place = (row % stride[0]) * stride[1] + column % stride[1]
        group, own = (channel // per_group, channel % per_group) if groups > 1 else (0, channel)
        wide = (group * (stride[0] * stride[1]) + place) * per_group + own
        return [n, wide, row // stride[0], column // stride[1]]

    return moved(call, result, shape, source, "pixels")
