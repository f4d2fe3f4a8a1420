"""Reductions, scans and sorting."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tvm import relax, te, tirx

from graphopt.backends.tvm.layout import Ordered, ordered, plain, reshaped
from graphopt.backends.tvm.operators.elementwise import per_element, truth
from graphopt.backends.tvm.operators.extreme import argument_of, largest_over
from graphopt.backends.tvm.operators.normalize import mean_of
from graphopt.backends.tvm.operators.pool import mean_over
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


@converts(aten.mean.default, aten.mean.dim, layout="any")
def mean(call: Call, self: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    known = ordered(self)
    rank = len(known.order)
    axes = [normal_axis(a, rank) for a in dim] if isinstance(dim, list | tuple) else []
    if axes and isinstance(self, Ordered) and sorted(axes) == [*range(rank - len(axes), rank)] and len(axes) < rank:
        x = Ordered(call.cast(known.value, wide(call.dtype)), known.order)
        result = mean_over(call, x, len(axes))
        return result if keepdim else reshaped(call, result, call.shape)
    self = plain(call, self)
    result = mean_of(call, call.cast(self, wide(call.dtype)), _axes(self, dim))
    return result if keepdim else call.reshape(result, call.shape)


@converts(aten.prod.default, aten.prod.dim_int)
def prod(call: Call, self: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    return op.prod(call.cast(self, wide(call.dtype)), _axes(self, dim), keepdims=keepdim)


@converts(aten.amax.default, aten.max.default)
def amax(call: Call, self: Any, dim: Any = None, keepdim: bool = False) -> Any:
    return _extreme(call, self, dim, keepdim, smallest=False)


@converts(aten.amin.default, aten.min.default)
def amin(call: Call, self: Any, dim: Any = None, keepdim: bool = False) -> Any:
    return _extreme(call, self, dim, keepdim, smallest=True)


def _extreme(call: Call, self: Any, dim: Any, keepdim: bool, *, smallest: bool) -> Any:
    x = call.cast(self, "int8" if call.dtype == "bool" else wide(call.dtype))
    result = largest_over(call, x, _axes(x, dim), smallest_instead=smallest)
    return result if keepdim else call.reshape(result, call.shape)


@converts(aten.max.dim)
def max_dim(call: Call, self: Any, dim: int, keepdim: bool = False) -> Any:
    return _extreme_and_index(call, self, dim, smallest=False)


@converts(aten.min.dim)
def min_dim(call: Call, self: Any, dim: int, keepdim: bool = False) -> Any:
    return _extreme_and_index(call, self, dim, smallest=True)


def _extreme_and_index(call: Call, self: Any, dim: int, *, smallest: bool) -> Any:
    x = call.cast(self, wide(call.dtype))
    if not shape_of(x):
        return (x, relax.const(0, "int64"))
    (axis,) = _axes(x, dim)
    value = largest_over(call, x, [axis], smallest_instead=smallest)
    index = argument_of(call, x, axis, smallest_instead=smallest)
    return (call.reshape(value, call.shape), call.reshape(index, call.shape))


@converts(aten.argmax.default)
def argmax(call: Call, self: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    return _index_of(call, self, dim, smallest=False)


@converts(aten.argmin.default)
def argmin(call: Call, self: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    return _index_of(call, self, dim, smallest=True)


def _index_of(call: Call, self: Any, dim: int | None, *, smallest: bool) -> Any:
    x = call.cast(self, wide(dtype_of(self)))
    if not shape_of(x):
        return relax.const(0, "int64")
    if dim is None:
        x, dim = call.reshape(x, [functools.reduce(operator.mul, shape_of(x), 1)]), 0
    (axis,) = _axes(x, dim)
    return call.reshape(argument_of(call, x, axis, smallest_instead=smallest), call.shape)


def _quantifier(function: Callable[..., Any]) -> Callable[..., Any]:
    def convert(call: Call, self: Any, dim: Any = None, keepdim: bool = False) -> Any:
        found = truth(call, self)
        return call.cast(call.emit(function(call.cast(found, "int8"), _axes(self, dim), keepdims=keepdim)), "bool")

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
    if divisor == 0:
        raise Refused("variance of so few numbers that none is left to divide by")
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
    largest = largest_over(call, x, axes)
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
        result = largest_over(call, size, axes)
        return result if keepdim else call.reshape(result, call.shape)
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
    axis = normal_axis(dim, len(shape_of(self)))
    order = _order(call, self, axis, descending=largest)
    shape = call.shape
    first = call.compute(lambda t: te.compute(shape, lambda *i: t(*i), name="first"), order, name="first")
    return (call.emit(op.gather_elements(self, first, axis)), first)


@converts(aten.sort.default, aten.sort.stable)
def sort(call: Call, self: Any, dim: int = -1, descending: bool = False, stable: bool | None = None) -> Any:
    axis = normal_axis(dim, len(shape_of(self)))
    order = _order(call, self, axis, descending=descending)
    return (call.emit(op.gather_elements(self, order, axis)), order)


@converts(aten.argsort.default, aten.argsort.stable)
def argsort(call: Call, self: Any, dim: int = -1, descending: bool = False, stable: bool | None = None) -> Any:
    return _order(call, self, normal_axis(dim, len(shape_of(self))), descending=descending)


def _order(call: Call, self: Any, axis: int, *, descending: bool) -> Any:
    """Indices that sort, int64. Floats are sorted by integers in the same order, in which NaN comes last."""
    if not shape_of(self):
        raise Refused("sorting a single number")
    x = call.cast(self, "int8" if dtype_of(self) == "bool" else wide(dtype_of(self)))
    if "float" in dtype_of(x):
        bits = dtype_of(x).replace("float", "int")
        x = per_element(call, lambda value: _sortable(value, bits), x)
    return call.emit(op.argsort(x, axis, descending, "int64"))


def _sortable(value: Any, bits: str) -> Any:
    """An integer that grows with a float: its bits, those below the sign turned around for negative numbers."""
    raw = tirx.reinterpret(bits, value)
    most = tirx.max_value(bits)
    key = tirx.Select(raw < 0, raw ^ most, raw)
    return tirx.Select(tirx.isnan(value), most, tirx.Select(value == 0.0, tirx.const(0, bits), key))
