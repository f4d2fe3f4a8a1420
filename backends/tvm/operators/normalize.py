"""Normalisations. Statistics are computed in two passes (mean, then centred squares), in float32 for 16-bit floats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils import dlpack
from tvm import ir, relax

from graphopt.backends.tvm.kernels.normalization import standardized
from graphopt.backends.tvm.layout import Ordered, ordered
from graphopt.backends.tvm.registry import Call, Refused, converts, shape_of, wide

aten = torch.ops.aten
op = relax.op


def mean_of(call: Call, x: Any, axes: Sequence[int]) -> Any:
    """The mean over the axes, which are kept with size 1."""
    count: Any = 1
    for axis in axes:
        count = count * shape_of(x)[axis]
    dtype = str(x.ty.dtype)
    total = call.emit(op.sum(x, list(axes), keepdims=True))
    if isinstance(count, int):
        return call.emit(op.divide(total, relax.const(float(count) if count else np.nan, dtype)))
    return call.emit(op.divide(total, call.operand(count, dtype)))


def standardize(call: Call, x: Any, axes: Sequence[int], eps: float) -> Any:
    """(x - mean) / sqrt(variance + eps) over the axes."""
    centred = call.emit(op.subtract(x, mean_of(call, x, axes)))
    variance = mean_of(call, call.emit(op.multiply(centred, centred)), axes)
    spread = call.emit(op.rsqrt(call.emit(op.add(variance, relax.const(eps, str(x.ty.dtype))))))
    return call.emit(op.multiply(centred, spread))


def _affine(call: Call, x: Any, weight: Any, bias: Any, shape: Sequence[Any]) -> Any:
    dtype = str(x.ty.dtype)
    if weight is not None:
        x = call.emit(op.multiply(x, call.reshape(call.cast(weight, dtype), shape)))
    if bias is not None:
        x = call.emit(op.add(x, call.reshape(call.cast(bias, dtype), shape)))
    return x


@converts(aten.layer_norm.default)
def layer_norm(
    call: Call,
    input: Any,
    normalized_shape: Sequence[Any],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    x = _standardized(call, call.cast(input, wide(call.dtype)), len(normalized_shape), eps, centred=True)
    return _affine(call, x, weight, bias, shape_of(input)[-len(normalized_shape) :])


@converts(aten.rms_norm.default)
def rms_norm(
    call: Call, input: Any, normalized_shape: Sequence[Any], weight: Any = None, eps: float | None = None
) -> Any:
    """x / sqrt(mean(x^2) + eps) * weight; without eps, the machine epsilon of the input's dtype."""
    epsilon = torch.finfo(call.meta.dtype).eps if eps is None else eps
    x = _standardized(call, call.cast(input, wide(call.dtype)), len(normalized_shape), epsilon, centred=False)
    return _affine(call, x, weight, None, shape_of(input)[-len(normalized_shape) :])


def _standardized(call: Call, x: Any, count: int, eps: float, *, centred: bool) -> Any:
    """Centred (or not) and scaled over the last `count` axes; there is a kernel for float32."""
    shape = shape_of(x)
    axes = list(range(len(shape) - count, len(shape)))
    if str(x.ty.dtype) != "float32" or not all(isinstance(size, int) and size > 0 for size in shape[-count:]):
        if centred:
            return standardize(call, x, axes, eps)
        power = mean_of(call, call.emit(op.multiply(x, x)), axes)
        scale = call.emit(op.rsqrt(call.emit(op.add(power, relax.const(eps, str(x.ty.dtype))))))
        return call.emit(op.multiply(x, scale))
    rows = call.reshape(x, [*shape[:-count], math.prod(shape[-count:])]) if count > 1 else x
    result = call.compute(lambda t: standardized(t, eps, centred=centred), rows, name="standardized", anchor=True)
    return call.reshape(result, shape) if count > 1 else result


@converts(aten.group_norm.default)
def group_norm(
    call: Call,
    input: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    batch, channels, *spatial = shape_of(input)
    if not isinstance(channels, int):
        raise Refused("group_norm over a dynamic number of channels")
    grouped = call.reshape(call.cast(input, wide(call.dtype)), [batch, num_groups, channels // num_groups, *spatial])
    x = standardize(call, grouped, range(2, 3 + len(spatial)), eps)
    return _affine(call, call.reshape(x, call.shape), weight, bias, [channels] + [1] * len(spatial))


@converts(aten.instance_norm.default)
def instance_norm(
    call: Call,
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    if not use_input_stats:
        return batch_norm(call, input, weight, bias, running_mean, running_var, False, momentum, eps)
    if running_mean is not None:
        raise Refused("instance_norm that updates running statistics; call model.eval() first")
    rank = len(shape_of(input))
    x = standardize(call, call.cast(input, wide(call.dtype)), range(2, rank), eps)
    return _affine(call, x, weight, bias, [shape_of(input)[1]] + [1] * (rank - 2))


@converts(aten.batch_norm.default, layout="any")
def batch_norm(
    call: Call,
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Any:
    """input [N, C, ...] times a scale plus a shift per channel, both computed in float64 while compiling."""
    if training:
        raise Refused("batch_norm in training mode; call model.eval() first")
    mean, variance = _numbers(running_mean), _numbers(running_var)
    scale = 1 / np.sqrt(variance + eps)
    if weight is not None:
        scale = scale * _numbers(weight)
    shift = -mean * scale
    if bias is not None:
        shift = shift + _numbers(bias)
    dtype = wide(call.dtype)
    known = ordered(input)
    shape = [-1 if axis == 1 else 1 for axis in known.order]
    scaled = call.emit(op.multiply(call.cast(known.value, dtype), _constant(scale.reshape(shape), dtype)))
    return Ordered(call.emit(op.add(scaled, _constant(shift.reshape(shape), dtype))), known.order)


@converts(aten._native_batch_norm_legit_no_training.default, layout="any")
def native_batch_norm(
    call: Call,
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    momentum: float,
    eps: float,
) -> Any:
    result = batch_norm(call, input, weight, bias, running_mean, running_var, False, momentum, eps)
    return (result, None, None)


@converts(aten._native_batch_norm_legit_functional.default)
def training_batch_norm(call: Call, **arguments: Any) -> Any:
    raise Refused("batch_norm in training mode; call model.eval() first")


@converts(aten.native_layer_norm.default)
def native_layer_norm(
    call: Call, input: Any, normalized_shape: Sequence[Any], weight: Any, bias: Any, eps: float
) -> Any:
    return (layer_norm(call, input, normalized_shape, weight, bias, eps), None, None)


def _numbers(value: Any) -> Any:
    """A parameter's numbers in float64."""
    if isinstance(value, Ordered) or not isinstance(value, ir.GenericConst):
        raise Refused("batch_norm whose statistics, weight or bias are computed by the graph")
    return dlpack.from_dlpack(value.value).double().numpy()


def _constant(numbers: Any, dtype: str) -> Any:
    return relax.const(numbers.astype(dtype), dtype)
