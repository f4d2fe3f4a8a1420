"""Reductions, scans and sorting."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tvm import relax

from graphopt.backends.tvm.operators.normalize import mean_of
from graphopt.backends.tvm.registry import Call, Refused, converts, dtype_of, normal_axis, shape_of, wide

aten = torch.ops.aten
op = relax.op


def _axes(value: Any, dim: int | Sequence[int] | None) -> list[int]:
    """Non-negative axes; None or an empty list means all of them."""
    rank = len(shape_of(value))
    if dim is None or (not isinstance(dim, int) and not dim):
        return list(range(rank))
    return [normal_axis(axis, rank) for axis in ([dim] if isinstance(dim, int) else dim)]


@converts(aten.sum.default, aten.sum.dim_IntList)
def sum_(call: Call, self: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    return op.sum(call.cast(self, wide(call.dtype)), _axes(self, dim), keepdims=keepdim)


@converts(aten.mean.default, aten.mean.dim)
def mean(call: Call, self: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    result = mean_of(call, call.cast(self, wide(call.dtype)), _axes(self, dim))
    return result if keepdim else call.reshape(result, call.shape)


@converts(aten.prod.default, aten.prod.dim_int)
def prod(call: Call, self: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    return op.prod(call.cast(self, wide(call.dtype)), _axes(self, dim), keepdims=keepdim)


def _extreme(function: Callable[..., Any]) -> Callable[..., Any]:
    def convert(call: Call, self: Any, dim: Any = None, keepdim: bool = False) -> Any:
        dtype = "int8" if call.dtype == "bool" else wide(call.dtype)
        return function(call.cast(self, dtype), _axes(self, dim), keepdims=keepdim)

    return convert


converts(aten.amax.default, aten.max.default)(_extreme(op.max))
converts(aten.amin.default, aten.min.default)(_extreme(op.min))


def _extreme_and_index(function: Callable[..., Any], index: Callable[..., Any]) -> Callable[..., Any]:
    def convert(call: Call, self: Any, dim: int, keepdim: bool = False) -> Any:
        x = call.cast(self, wide(call.dtype))
        if not shape_of(x):
            return (x, relax.const(0, "int64"))
        (axis,) = _axes(self, dim)
        return (call.emit(function(x, axis, keepdims=keepdim)), call.emit(index(x, axis, keepdims=keepdim)))

    return convert


converts(aten.max.dim)(_extreme_and_index(op.max, op.argmax))
converts(aten.min.dim)(_extreme_and_index(op.min, op.argmin))


def _index_of(function: Callable[..., Any]) -> Callable[..., Any]:
    def convert(call: Call, self: Any, dim: int | None = None, keepdim: bool = False) -> Any:
        x = call.cast(self, wide(dtype_of(self)))
        if dim is None:
            x = call.reshape(x, [math.prod(shape_of(x))] if shape_of(x) else [1])
        elif not shape_of(x):
            return relax.const(0, "int64")
        result = call.emit(function(x, dim or 0, keepdims=keepdim and dim is not None))
        return call.reshape(result, call.shape)

    return convert


converts(aten.argmax.default)(_index_of(op.argmax))
converts(aten.argmin.default)(_index_of(op.argmin))


def _quantifier(function: Callable[..., Any]) -> Callable[..., Any]:
    def convert(call: Call, self: Any, dim: Any = None, keepdim: bool = False) -> Any:
        truth = call.emit(op.not_equal(self, relax.const(0, dtype_of(self)))) if dtype_of(self) != "bool" else self
        return call.cast(call.emit(function(call.cast(truth, "int8"), _axes(self, dim), keepdims=keepdim)), "bool")

    return convert


converts(aten.any.default, aten.any.dim, aten.any.dims)(_quantifier(op.max))
converts(aten.all.default, aten.all.dim, aten.all.dims)(_quantifier(op.min))


def _variance(call: Call, self: Any, dim: Any, correction: Any, keepdim: bool) -> tuple[Any, Any]:
    """Variance and mean; the divisor is the count less the correction (1 unless given), at least 0."""
    x = call.cast(self, wide(call.dtype))
    axes = _axes(self, dim)
    counts = [shape_of(x)[axis] for axis in axes]
    if not all(isinstance(size, int) for size in counts):
        raise Refused("variance over a dynamic size")
    divisor = max(0.0, math.prod(counts) - (1 if correction is None else correction))
    average = mean_of(call, x, axes)
    centred = call.emit(op.subtract(x, average))
    squares = call.emit(op.sum(call.emit(op.multiply(centred, centred)), axes, keepdims=True))
    variance = call.emit(op.divide(squares, relax.const(divisor, dtype_of(x))))
    return (variance, average) if keepdim else (call.reshape(variance, call.shape), call.reshape(average, call.shape))


@converts(aten.var.correction)
def var_correction(call: Call, self: Any, dim: Any = None, correction: Any = None, keepdim: bool = False) -> Any:
    return _variance(call, self, dim, correction, keepdim)[0]


@converts(aten.std.correction)
def std_correction(call: Call, self: Any, dim: Any = None, correction: Any = None, keepdim: bool = False) -> Any:
    return op.sqrt(_variance(call, self, dim, correction, keepdim)[0])


@converts(aten.var.dim, aten.var.default)
def var_dim(call: Call, self: Any, dim: Any = None, unbiased: bool = True, keepdim: bool = False) -> Any:
    return _variance(call, self, dim, int(unbiased), keepdim)[0]


@converts(aten.std.dim, aten.std.default)
def std_dim(call: Call, self: Any, dim: Any = None, unbiased: bool = True, keepdim: bool = False) -> Any:
    return op.sqrt(_variance(call, self, dim, int(unbiased), keepdim)[0])


@converts(aten.var_mean.correction)
def var_mean(call: Call, self: Any, dim: Any = None, correction: Any = None, keepdim: bool = False) -> Any:
    return _variance(call, self, dim, correction, keepdim)


@converts(aten.logsumexp.default)
def logsumexp(call: Call, self: Any, dim: Any, keepdim: bool = False) -> Any:
    """max + log(sum(exp(x - max))), with an infinite maximum counted as zero."""
    x = call.cast(self, wide(call.dtype))
    axes, dtype = _axes(self, dim), dtype_of(x)
    largest = call.emit(op.max(x, axes, keepdims=True))
    unbounded = call.emit(op.isinf(largest))
    largest = call.emit(op.where(unbounded, relax.const(0, dtype), largest))
    powers = call.emit(op.exp(call.emit(op.subtract(x, largest))))
    total = call.emit(op.log(call.emit(op.sum(powers, axes, keepdims=True))))
    result = call.emit(op.add(total, largest))
    return result if keepdim else call.reshape(result, call.shape)


@converts(aten.linalg_vector_norm.default)
def vector_norm(call: Call, self: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    x = call.cast(self, wide(call.dtype))
    axes = _axes(self, dim)
    if ord == 2:
        return op.sqrt(call.emit(op.sum(call.emit(op.multiply(x, x)), axes, keepdims=keepdim)))
    size = call.emit(op.abs(x))
    if ord == 1:
        return op.sum(size, axes, keepdims=keepdim)
    if ord == math.inf:
        return op.max(size, axes, keepdims=keepdim)
    raise Refused(f"a vector norm of order {ord}")


@converts(aten.norm.ScalarOpt_dim)
def norm(call: Call, self: Any, p: Any, dim: Any, keepdim: bool = False) -> Any:
    return vector_norm(call, self, 2 if p is None else p, dim, keepdim)


@converts(aten.cumsum.default)
def cumsum(call: Call, self: Any, dim: int, dtype: Any = None) -> Any:
    return _scan(call, self, dim, op.cumsum)


@converts(aten.cumprod.default)
def cumprod(call: Call, self: Any, dim: int, dtype: Any = None) -> Any:
    return _scan(call, self, dim, op.cumprod)


def _scan(call: Call, x: Any, dim: int, function: Callable[..., Any]) -> Any:
    dtype = wide(call.dtype)
    if not shape_of(x):
        return call.cast(x, dtype)
    return function(call.cast(x, dtype), axis=normal_axis(dim, len(shape_of(x))), dtype=dtype)


@converts(aten.topk.default)
def topk(call: Call, self: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """Values and indices in order. Among equal values the indices may differ from torch's, which promises none."""
    x = call.cast(self, wide(call.dtype))
    if not isinstance(k, int):
        raise Refused("topk with a dynamic k")
    values, indices = call.emit(op.topk(x, k, dim, "both", largest, "int64"))
    return (values, indices)


@converts(aten.sort.default, aten.sort.stable)
def sort(call: Call, self: Any, dim: int = -1, descending: bool = False, stable: bool | None = None) -> Any:
    x = call.cast(self, wide(call.dtype))
    order = call.emit(op.argsort(x, dim, descending, "int64"))
    return (call.emit(op.gather_elements(x, order, normal_axis(dim, len(shape_of(x))))), order)


@converts(aten.argsort.default)
def argsort(call: Call, self: Any, dim: int = -1, descending: bool = False) -> Any:
    return op.argsort(call.cast(self, wide(dtype_of(self))), dim, descending, "int64")
