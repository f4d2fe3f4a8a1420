"""Largest and smallest, as torch means them: NaN wins over every number, and the largest of nothing is -inf.

TVM's own max and min lose NaN, and start from the smallest finite number. Its `!=` on floats is false for NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tvm import te, tirx

from graphopt.backends.tvm.registry import Call, Refused, dtype_of, shape_of

__all__ = [
    "argument_of",
    "at_least",
    "at_most",
    "differs",
    "if_numbers",
    "larger",
    "largest",
    "largest_over",
    "lowest",
    "not_zero",
    "smaller",
]


def _is_nan(x: Any) -> Any:
    return tirx.isnan(x) if "float" in str(x.ty.dtype) else tirx.const(False, "bool")


def larger(x: Any, y: Any) -> Any:
    """The larger of two TIR scalars, NaN if one of them is."""
    return tirx.Select(tirx.any(x > y, _is_nan(x)), x, y)


def smaller(x: Any, y: Any) -> Any:
    """The smaller of two TIR scalars, NaN if one of them is."""
    return tirx.Select(tirx.any(x < y, _is_nan(x)), x, y)


def at_least(x: Any, bound: Any) -> Any:
    """x, but no less than a bound that is not NaN; one machine instruction."""
    return tirx.Select(x < bound, bound, x)


def at_most(x: Any, bound: Any) -> Any:
    """x, but no more than a bound that is not NaN; one machine instruction."""
    return tirx.Select(x > bound, bound, x)


def not_zero(x: Any) -> Any:
    """Whether a TIR scalar is true as a boolean; NaN is."""
    return differs(x, tirx.const(0, str(x.ty.dtype)))


def differs(x: Any, y: Any) -> Any:
    """Whether two TIR scalars differ; NaN differs from everything. (TVM turns `not (x == y)` into its own `!=`.)"""
    return tirx.any(x != y, _is_nan(x), _is_nan(y))


def if_numbers(condition: Any, x: Any, y: Any) -> Any:
    """A comparison, but false where a side is NaN. (TVM simplifies `x == x` and `x <= x` to true.)"""
    return tirx.all(condition, tirx.Not(_is_nan(x)), tirx.Not(_is_nan(y)))


def lowest(dtype: str) -> Any:
    """What every number of a dtype is at least: -inf where there is one."""
    return tirx.const(-math.inf, dtype) if "float" in dtype else tirx.min_value(dtype)


def _highest(dtype: str) -> Any:
    return tirx.const(math.inf, dtype) if "float" in dtype else tirx.max_value(dtype)


largest = te.comm_reducer(larger, lowest, name="largest")
smallest = te.comm_reducer(smaller, _highest, name="smallest")


def largest_over(call: Call, x: Any, axes: Sequence[int], *, smallest_instead: bool = False) -> Any:
    """The largest (or smallest) elements over the axes, which are kept with size 1.

    Raises:
        Refused: for an axis without elements, which torch refuses too.
    """
    sizes = shape_of(x)
    if any(sizes[axis] == 0 for axis in axes):
        raise Refused("the largest of no elements")
    if not axes:
        return x
    reduce = smallest if smallest_instead else largest
    shape = [1 if axis in axes else size for axis, size in enumerate(sizes)]

    def compute(t: te.Tensor) -> te.Tensor:
        over = {axis: te.reduce_axis((0, sizes[axis]), "k") for axis in axes}

        def element(*i: Any) -> Any:
            return reduce(t(*(over.get(a, at) for a, at in enumerate(i))), axis=list(over.values()))

        return te.compute(shape, element, name="extreme")

    return call.compute(compute, x, name="extreme")


def argument_of(call: Call, x: Any, axis: int, *, smallest_instead: bool = False) -> Any:
    """The index of the first largest (smallest, or NaN) element along an axis, which is kept with size 1; int64."""
    size = shape_of(x)[axis]
    extreme = largest_over(call, x, [axis], smallest_instead=smallest_instead)
    floating = "float" in dtype_of(x)

    def compute(t: te.Tensor, e: te.Tensor) -> te.Tensor:
        k = te.reduce_axis((0, size), "k")

        def element(*i: Any) -> Any:
            value, best = t(*(k if a == axis else at for a, at in enumerate(i))), e(*i)
            found = value == best
            if floating:
                found = tirx.any(found, tirx.all(tirx.isnan(value), tirx.isnan(best)))
            return te.min(tirx.Select(found, tirx.Cast("int64", k), tirx.Cast("int64", size)), axis=k)

        return te.compute(e.shape, element, name="argument")

    return call.compute(compute, x, extreme, name="argument")
