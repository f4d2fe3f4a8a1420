"""ONNX operators on sizes known while importing (`Known` values), so that shape arithmetic stays symbolic.

A function here returns None for what it cannot do exactly; the node then runs on tensors like any other, and whoever
needs its result as a size refuses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from graphopt.frontends.onnx.dtypes import to_dtype
from graphopt.frontends.onnx.values import Constant, Inexact, Known, Number, Ratio

__all__ = ["evaluate"]

Function = Callable[..., "Known | list[Known] | None"]
_TABLE: dict[str, Function] = {}
_LARGEST = 64
"""Longest vector that is made here; anything longer is data, not a shape."""


def host(name: str) -> Callable[[Function], Function]:
    def register(function: Function) -> Function:
        _TABLE[name] = function
        return function

    return register


def evaluate(operator: str, inputs: list[Known | None], attributes: Mapping[str, Any]) -> list[Known] | None:
    """Run an operator on known values; None when it cannot be done exactly."""
    function = _TABLE.get(operator)
    if function is None:
        return None
    try:
        result = function(*inputs, **attributes)
    except (Inexact, TypeError, ValueError, IndexError, ZeroDivisionError, OverflowError):
        return None  # not shape arithmetic after all: the tensor implementation decides, with its own errors
    results = [result] if isinstance(result, Known) else result
    return None if results is None else [_rounded(known) for known in results]


def _rounded(known: Known) -> Known:
    """Numbers as the dtype stores them."""
    if known.dtype is torch.float32:
        return known.map(lambda v: float(np.float32(v)) if isinstance(v, float) else v)
    if known.dtype not in (torch.float64, torch.int64, torch.int32, torch.bool):
        raise Inexact
    if known.dtype in (torch.int32, torch.int64) and known.concrete:
        limits = torch.iinfo(known.dtype)
        if any(not limits.min <= v <= limits.max for v in known.numbers):
            raise OverflowError
    return known


def _list(known: Known | tuple[int, ...]) -> list[int]:
    """Concrete integers, from an input or an attribute; `int()` on a dynamic size would freeze it."""
    if isinstance(known, tuple):
        return list(known)
    if not known.concrete:
        raise Inexact
    return [int(v) for v in known.numbers]


def _elementwise(function: Callable[..., Number], *inputs: Known, dtype: torch.dtype | None = None) -> Known:
    arrays = np.broadcast_arrays(*(known.array for known in inputs))
    rows = zip(*(array.reshape(-1) for array in arrays), strict=True)
    return Known.of([function(*row) for row in rows], arrays[0].shape, dtype or inputs[0].dtype)


def _add(a: Number, b: Number) -> Number:
    if isinstance(a, Ratio):
        return a.plus(b)
    return b.plus(a) if isinstance(b, Ratio) else a + b


def _multiply(a: Number, b: Number) -> Number:
    if isinstance(a, Ratio):
        return a.times(b)
    return b.times(a) if isinstance(b, Ratio) else a * b


def _divide(a: Number, b: Number) -> Number:
    if isinstance(a, Ratio):
        return a.over(b)
    if isinstance(a, float):
        return a / b
    if isinstance(b, torch.SymInt):
        return a // b if a >= 0 else -((-a) // b)
    quotient = a // b if a >= 0 else -((-a) // b)  # ONNX divides integers towards zero
    return quotient if b > 0 else -(a // -b if a >= 0 else -((-a) // -b))


def _modulo(a: Number, b: Number) -> Number:
    if isinstance(a, float) or isinstance(b, torch.SymInt):
        raise Inexact
    return a % b


def _smaller(a: Number, b: Number) -> Number:
    return torch.sym_min(a, b) if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt) else min(a, b)


def _larger(a: Number, b: Number) -> Number:
    return torch.sym_max(a, b) if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt) else max(a, b)


for _name, _function in {
    "Add": _add,
    "Sub": lambda a, b: _add(a, _multiply(b, -1)),
    "Mul": _multiply,
    "Div": _divide,
}.items():
    host(_name)(lambda a, b, f=_function: _elementwise(f, a, b))

for _name, _compare in {
    "Equal": lambda a, b: bool(a == b),
    "Less": lambda a, b: bool(a < b),
    "LessOrEqual": lambda a, b: bool(a <= b),
    "Greater": lambda a, b: bool(a > b),
    "GreaterOrEqual": lambda a, b: bool(a >= b),
    "And": lambda a, b: bool(a and b),
    "Or": lambda a, b: bool(a or b),
}.items():
    host(_name)(lambda a, b, f=_compare: _elementwise(f, a, b, dtype=torch.bool))


@host("Mod")
def modulo(a: Known, b: Known, *, fmod: int = 0) -> Known | None:
    return None if fmod else _elementwise(_modulo, a, b)


@host("Min")
def minimum(first: Known, *rest: Known) -> Known:
    for other in rest:
        first = _elementwise(_smaller, first, other)
    return first


@host("Max")
def maximum(first: Known, *rest: Known) -> Known:
    for other in rest:
        first = _elementwise(_larger, first, other)
    return first


@host("Neg")
def negative(x: Known) -> Known:
    return x.map(lambda v: _multiply(v, -1))


@host("Not")
def logical_not(x: Known) -> Known:
    return x.map(lambda v: not v)


@host("Floor")
def floor(x: Known) -> Known:
    return x.map(lambda v: Ratio(v.floor) if isinstance(v, Ratio) else float(math.floor(v)))


@host("Ceil")
def ceil(x: Known) -> Known:
    return x.map(lambda v: Ratio(v.ceil) if isinstance(v, Ratio) else float(math.ceil(v)))


@host("Sqrt")
def sqrt(x: Known) -> Known | None:
    return x.map(math.sqrt) if x.concrete else None


@host("Cast")
def cast(x: Known, *, to: int, saturate: int = 1) -> Known | None:
    dtype = to_dtype(to)
    if dtype in (torch.int32, torch.int64):
        return x.map(_truncated, dtype)
    if dtype in (torch.float32, torch.float64):
        return x.map(
            lambda v: Ratio(v) if isinstance(v, torch.SymInt) else v if isinstance(v, Ratio) else float(v), dtype
        )
    return x.map(bool, dtype) if dtype is torch.bool and x.concrete else None


def _truncated(v: Number) -> Number:
    if isinstance(v, Ratio):
        return v.floor if v.num >= 0 else v.ceil
    return v if isinstance(v, torch.SymInt) else int(v)


@host("Where")
def where(condition: Known, x: Known, y: Known) -> Known:
    return _elementwise(lambda c, a, b: a if c else b, condition, x, y, dtype=x.dtype)


@host("Identity")
def identity(x: Known) -> Known:
    return x


@host("Shape")
def shape(x: Known, *, start: int = 0, end: int | None = None) -> Known:
    sizes = x.shape[start:end]
    return Known.of(list(sizes), (len(sizes),), torch.int64)


@host("Size")
def size(x: Known) -> Known:
    return Known.of([len(x.numbers)], (), torch.int64)


@host("Concat")
def concat(*inputs: Known, axis: int) -> Known:
    return Known(np.concatenate([known.array for known in inputs], axis), inputs[0].dtype)


@host("Gather")
def gather(data: Known, indices: Known, *, axis: int = 0) -> Known:
    where_ = np.array(_list(indices), dtype=np.int64).reshape(indices.shape)
    taken: Any = np.take(data.array, where_, axis)
    if not isinstance(taken, np.ndarray):  # a 0-d index gives the element itself
        return Known.of([taken], (), data.dtype)
    return Known(taken, data.dtype)


@host("Slice")
def slice_(
    data: Known,
    starts: Known | tuple[int, ...],
    ends: Known | tuple[int, ...],
    axes: Known | tuple[int, ...] | None = None,
    steps: Known | None = None,
) -> Known:
    firsts, lasts = _list(starts), _list(ends)
    where_ = _list(axes) if axes is not None else list(range(len(firsts)))
    strides = _list(steps) if steps is not None else [1] * len(firsts)
    array = data.array
    for first, last, axis, step in zip(firsts, lasts, where_, strides, strict=True):
        if step < 0:
            last = last if last >= -array.shape[axis] else None  # type: ignore[assignment]  # None: past the front
        index = [slice(None)] * array.ndim
        index[axis] = slice(first, last, step)
        array = array[tuple(index)]
    return Known(array, data.dtype)


@host("Squeeze")
def squeeze(x: Known, axes: Known | tuple[int, ...] | None = None) -> Known:
    chosen = None if axes is None else tuple(_list(axes))
    return Known(np.asarray(np.squeeze(x.array, chosen), dtype=object), x.dtype)


@host("Unsqueeze")
def unsqueeze(x: Known, axes: Known | tuple[int, ...]) -> Known:
    return Known(np.expand_dims(x.array, tuple(_list(axes))), x.dtype)


@host("Reshape")
def reshape(x: Known, to: Known, *, allowzero: int = 0) -> Known:
    sizes = [x.shape[i] if v == 0 and not allowzero else v for i, v in enumerate(_list(to))]
    return Known(x.array.reshape(sizes), x.dtype)


@host("Expand")
def expand(x: Known, to: Known) -> Known | None:
    sizes = _list(to)
    if math.prod(sizes) > _LARGEST:
        return None
    return Known(np.broadcast_to(x.array, np.broadcast_shapes(x.shape, tuple(sizes))), x.dtype)


@host("ConstantOfShape")
def constant_of_shape(sizes: Known, *, value: Constant | None = None) -> Known | None:
    counts = _list(sizes)
    if len(counts) > 1 or math.prod(counts) > _LARGEST:
        return None
    fill = Known.of([0.0], (1,), torch.float32) if value is None else value.known
    assert fill is not None  # a single element
    return Known.of(fill.numbers * math.prod(counts), tuple(counts), fill.dtype)


@host("Range")
def range_(start: Known, limit: Known, delta: Known) -> Known | None:
    (first,), (last,), (step,) = _list(start), _list(limit), _list(delta)
    if start.dtype not in (torch.int32, torch.int64) or len(numbers := range(first, last, step)) > _LARGEST:
        return None
    return Known.of(list(numbers), (len(numbers),), start.dtype)


@host("ReduceProd")
def reduce_prod(
    x: Known, axes: Known | tuple[int, ...] | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Known | None:
    chosen = [0] if axes is None else _list(axes)
    if x.array.ndim != 1 or chosen not in ([0], [-1]) or x.dtype.is_floating_point:
        return None
    return Known.of([math.prod(x.numbers)], (1,) if keepdims else (), x.dtype)


@host("Split")
def split(
    x: Known, split: Known | tuple[int, ...] | None = None, *, axis: int = 0, num_outputs: int | None = None
) -> list[Known] | None:
    if split is None or x.array.ndim != 1 or axis not in (0, -1):
        return None
    ends = np.cumsum(_list(split))
    return [Known(part, x.dtype) for part in np.split(x.array, ends[:-1])]
