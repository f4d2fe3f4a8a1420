"""Reductions, running sums, arg-extrema and sorting."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.frontends.onnx.dtypes import INTEGERS
from graphopt.frontends.onnx.registry import operator
from graphopt.frontends.onnx.unsigned import widened
from graphopt.frontends.onnx.values import Ints, refuse

Reduction = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def _sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.sum(x, axes, keep, dtype=x.dtype)


def _prod(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keep, dtype=x.dtype)
    return x


def _mean(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.mean(x, axes, keep)


def _extremum(function: Callable[..., Tensor], largest: bool) -> Reduction:
    def run(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
        if not any(isinstance(x.shape[axis], int) and x.shape[axis] == 0 for axis in axes):
            return widened(lambda t: function(t, axes, keep), x)
        sizes = [1 if i in axes else d for i, d in enumerate(x.shape)]
        empty = torch.full(sizes, _identity(x.dtype, largest), dtype=x.dtype)
        return empty if keep else empty.squeeze(axes)

    return run


def _identity(dtype: torch.dtype, largest: bool) -> float:
    """What the largest (or smallest) of nothing is."""
    if dtype.is_floating_point:
        return float("-inf") if largest else float("inf")
    if dtype is torch.bool:
        return not largest
    return torch.iinfo(dtype).min if largest else torch.iinfo(dtype).max


def _norm1(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(torch.abs(x), axes, keep)


def _norm2(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.sqrt(_sum(x * x, axes, keep))


def _log_sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.log(_sum(x, axes, keep))


def _log_sum_exp(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.logsumexp(x, axes, keep)


def _sum_square(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(x * x, axes, keep)


def _reduce(x: Tensor, axes: Ints | None, keepdims: int, noop: int, reduction: Reduction, point: Reduction) -> Tensor:
    """No axes means all of them, or, with `noop_with_empty_axes`, that only the element-wise part (`point`) runs."""
    if not axes and noop:
        return point(x, (), True)
    chosen = tuple(axis % x.ndim for axis in axes) if axes else tuple(range(x.ndim))
    return reduction(x, chosen, bool(keepdims)) if x.ndim else point(x, (), True)


def _points(name: str) -> Reduction:
    """A reduction over no axis at all."""
    return {
        "ReduceL1": lambda x, *_: torch.abs(x),
        "ReduceL2": lambda x, *_: torch.abs(x),
        "ReduceLogSum": lambda x, *_: torch.log(x),
        "ReduceSumSquare": lambda x, *_: x * x,
    }.get(name, lambda x, *_: x.clone())


def _register(name: str, reduction: Reduction, inputs_since: int) -> None:
    point = _points(name)

    def from_attribute(x: Tensor, *, axes: Ints | None = None, keepdims: int = 1) -> Tensor:
        return _reduce(x, axes, keepdims, 0, reduction, point)

    def from_input(x: Tensor, axes: Ints | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        return _reduce(x, axes, keepdims, noop_with_empty_axes, reduction, point)

    operator(name, until=inputs_since - 1)(from_attribute)
    operator(name, since=inputs_since)(from_input)


_register("ReduceSum", _sum, 13)
for _name, _function in {
    "ReduceL1": _norm1,
    "ReduceL2": _norm2,
    "ReduceLogSum": _log_sum,
    "ReduceLogSumExp": _log_sum_exp,
    "ReduceMax": _extremum(torch.amax, largest=True),
    "ReduceMean": _mean,
    "ReduceMin": _extremum(torch.amin, largest=False),
    "ReduceProd": _prod,
    "ReduceSumSquare": _sum_square,
}.items():
    _register(_name, _function, 18)


def _arg(x: Tensor, axis: int, keepdims: int, last: int, function: Callable[..., Tensor]) -> Tensor:
    if not last:
        return function(x, axis, bool(keepdims))
    return x.shape[axis] - 1 - function(x.flip(axis), axis, bool(keepdims))


@operator("ArgMax", until=11)
def arg_max_first(x: Tensor, *, axis: int = 0, keepdims: int = 1) -> Tensor:
    return _arg(x, axis, keepdims, 0, torch.argmax)


@operator("ArgMax", since=12)
def arg_max(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return _arg(x, axis, keepdims, select_last_index, torch.argmax)


@operator("ArgMin", until=11)
def arg_min_first(x: Tensor, *, axis: int = 0, keepdims: int = 1) -> Tensor:
    return _arg(x, axis, keepdims, 0, torch.argmin)


@operator("ArgMin", since=12)
def arg_min(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return _arg(x, axis, keepdims, select_last_index, torch.argmin)


def _running(x: Tensor, axis: int, reverse: int, exclusive: int, function: Callable[..., Tensor], unit: int) -> Tensor:
    x = x.flip(axis) if reverse else x
    result = function(x, axis, dtype=x.dtype)
    if exclusive:
        kept = result.narrow(axis, 0, x.shape[axis] - 1)
        result = torch.cat([torch.full_like(x.narrow(axis, 0, 1), unit), kept], axis)
    return result.flip(axis) if reverse else result


@operator("CumSum", since=11)
def cumulative_sum(x: Tensor, axis: int, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    return _running(x, int(axis), reverse, exclusive, torch.cumsum, 0)


@operator("CumProd", since=26)
def cumulative_product(x: Tensor, axis: int, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    return _running(x, int(axis), reverse, exclusive, torch.cumprod, 1)


@operator("TopK", until=9)
def top_k_attribute(x: Tensor, *, k: int, axis: int = -1) -> tuple[Tensor, Tensor]:
    return top_k(x, k, axis=axis)


@operator("TopK", since=10, until=10)
def top_k_largest(x: Tensor, k: int, *, axis: int = -1) -> tuple[Tensor, Tensor]:
    return top_k(x, k, axis=axis)


@operator("TopK", since=11)
def top_k(x: Tensor, k: int, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    """Among equal values the lower index comes first, which `torch.topk` does not promise: hence a stable sort."""
    if x.dtype in INTEGERS and x.dtype in (torch.uint16, torch.uint32, torch.uint64):
        raise refuse(f"torch cannot sort {x.dtype}", "cast to int64 before the node")
    values, indices = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    return values.narrow(axis, 0, k), indices.narrow(axis, 0, k)


@operator("LpNormalization")
def lp_normalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    if p not in (1, 2):
        raise refuse(f"attribute 'p'={p} is not handled")
    return F.normalize(x, p=float(p), dim=axis)


@operator("MeanVarianceNormalization", since=9)
def mean_variance_normalization(x: Tensor, *, axes: Ints = (0, 2, 3)) -> Tensor:
    """`(x - E[x]) / sqrt(E[(x - E[x])^2])`; 1e-9 keeps the deviation above zero as in ONNX."""
    centred = x - x.mean(axes, keepdim=True)
    return centred / (torch.sqrt((centred * centred).mean(axes, keepdim=True)) + 1e-9)
