"""Quantised values: `x ~ (q - zero) * scale`, per tensor, per axis, or per block of an axis."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.frontends.onnx.dtypes import INTEGERS, to_dtype
from graphopt.frontends.onnx.operators.conv import conv_integer
from graphopt.frontends.onnx.operators.data import convert
from graphopt.frontends.onnx.operators.matmul import matmul_integer
from graphopt.frontends.onnx.registry import operator
from graphopt.frontends.onnx.values import Ints, refuse


def _spread(parameter: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """A scale or zero point in a shape that broadcasts to `x`."""
    if parameter.numel() == 1 and (parameter.ndim == 0 or x.ndim <= 1 or not block):
        return parameter.reshape(())
    axis %= x.ndim
    if block:
        if parameter.ndim != x.ndim:
            raise refuse("a scale per block needs as many axes as the input")
        return parameter.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    if parameter.ndim != 1:
        raise refuse(f"a scale of {parameter.ndim} axes without a block size")
    return parameter.reshape([-1] + [1] * (x.ndim - 1 - axis))


def _saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    limits = torch.iinfo(dtype)
    return torch.clamp(x, limits.min, limits.max).to(dtype)


@operator("QuantizeLinear", since=10, until=12)
def quantize_per_tensor(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    return quantize(x, scale, zero)


@operator("QuantizeLinear", since=13, until=18)
def quantize_per_axis(x: Tensor, scale: Tensor, zero: Tensor | None = None, *, axis: int = 1) -> Tensor:
    return quantize(x, scale, zero, axis=axis)


@operator("QuantizeLinear", since=19, until=20)
def quantize_saturating(
    x: Tensor, scale: Tensor, zero: Tensor | None = None, *, axis: int = 1, saturate: int = 1
) -> Tensor:
    return quantize(x, scale, zero, axis=axis, saturate=saturate)


@operator("QuantizeLinear", since=21)
def quantize(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
) -> Tensor:
    """`saturate(round(x / scale) + zero)`, dividing in the type of the scale unless `precision` names another."""
    dtype = zero.dtype if zero is not None else to_dtype(output_dtype) if output_dtype else torch.uint8
    wide = to_dtype(precision) if precision else scale.dtype
    y = x.to(wide) / _spread(scale, x, axis, block_size).to(wide)
    if dtype not in INTEGERS:
        offset = 0.0 if zero is None else _spread(zero.to(torch.float32), x, axis, block_size)
        return convert(y.to(torch.float32) + offset, dtype, saturate)
    y = torch.round(y).to(torch.float32)
    if zero is not None:
        y = y + _spread(zero, x, axis, block_size).to(torch.float32)
    return _saturated(y, dtype)


@operator("DequantizeLinear", since=10, until=12)
def dequantize_per_tensor(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    return dequantize(x, scale, zero)


@operator("DequantizeLinear", since=13, until=20)
def dequantize_per_axis(x: Tensor, scale: Tensor, zero: Tensor | None = None, *, axis: int = 1) -> Tensor:
    return dequantize(x, scale, zero, axis=axis)


@operator("DequantizeLinear", since=21)
def dequantize(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    """`(x - zero) * scale` in the type of the scale, or in `output_dtype`."""
    dtype = to_dtype(output_dtype) if output_dtype else scale.dtype
    if x.dtype in INTEGERS and zero is not None:
        wide = torch.int64 if x.dtype is torch.int32 else torch.int32
        centred = (x.to(wide) - _spread(zero, x, axis, block_size).to(wide)).to(dtype)
    else:
        centred = x.to(dtype)
        if zero is not None:
            centred = centred - _spread(zero.to(torch.float32), x, axis, block_size).to(dtype)
    return centred * _spread(scale, x, axis, block_size).to(dtype)


@operator("DynamicQuantizeLinear", since=11)
def dynamic_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """To uint8, over the range of the data widened to hold zero."""
    low, high = torch.clamp(x.amin(), max=0.0), torch.clamp(x.amax(), min=0.0)
    scale = (high - low) / 255.0
    zero = torch.round(torch.clamp(-low / scale, 0.0, 255.0))
    return _saturated(torch.round(x / scale) + zero, torch.uint8), scale, zero.to(torch.uint8)


def _requantized(total: Tensor, factor: Tensor, y_scale: Tensor, y_zero: Tensor) -> Tensor:
    y = torch.round(total.to(torch.float32) * factor.to(torch.float32) / y_scale.to(torch.float32))
    return _saturated(y + y_zero.to(torch.float32), y_zero.dtype)


@operator("QLinearMatMul", since=10)
def qlinear_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
) -> Tensor:
    if max(p.numel() for p in (a_scale, a_zero, b_scale, b_zero, y_scale, y_zero)) > 1:
        raise refuse("scales per row or column are not handled")
    product = matmul_integer(a, b, a_zero.reshape(()), b_zero.reshape(()))
    factor = (a_scale.float() * b_scale.float()).reshape(())
    return _requantized(product, factor, y_scale.reshape(()), y_zero.reshape(()))


@operator("QLinearConv", since=10)
def qlinear_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """The weight's scale and zero point may be per output channel; the bias is in int32, scaled as the product."""
    total = conv_integer(
        x, w, x_zero, w_zero, auto_pad=auto_pad, dilations=dilations, group=group,
        kernel_shape=kernel_shape, pads=pads, strides=strides,
    )  # fmt: skip
    channel = [-1] + [1] * (x.ndim - 2)
    total = total if b is None else total + b.reshape(channel)
    return _requantized(total, x_scale.reshape(()) * w_scale.reshape(channel), y_scale.reshape(()), y_zero.reshape(()))
