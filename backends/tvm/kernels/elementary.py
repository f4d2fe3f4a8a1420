"""exp, sigmoid, tanh and erf of float32 in plain arithmetic, so that they run in vectors.

LLVM calls the C library for them, one number at a time. The formulas here reduce the argument and evaluate a
polynomial; the coefficients are least-squares fits at Chebyshev nodes, reweighted until the error is even. Largest
relative errors over all finite arguments, against float64 (tests measure them): exp 2e-7, sigmoid 3e-7, tanh 4e-7,
erf 4e-7. NaN gives NaN, infinities give the limits; exp is 0 below -86.9, where it is less than 1.8e-38.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tvm_ffi
from tvm import ir, tirx

__all__ = ["erf", "exp", "in_arithmetic", "in_library", "nests", "sigmoid", "tanh"]

_EXP = (1.000000001, 1.000000036, 0.4999999208, 0.1666642017, 0.04166822564, 0.008374815782, 0.001383684192)
"""exp(r) for |r| <= ln(2) / 2."""

_TANH = (
    (0.9999999790796, 0.13379718932579, 0.0034940355914834, 2.05834941111688e-05, 1.33190838249780e-08),
    (1.0, 0.46713034190947, 0.0258710774721367, 0.000328309433284622, 7.76202548105698e-07),
)
_TANH_REACH = 9.003
"""tanh(x) / x in x^2 as a quotient of polynomials, for |x| up to the reach; tanh rounds to one there."""

_ERF = (
    (1.128379146194659, 0.19040543936026, 0.0527485860762195, 0.003765571490573, 0.0002848815021975, 2.05009029321e-6),
    (1.0, 0.5020751684780757, 0.1141086856225681, 0.014969127139008, 0.0011625240218426, 3.8091711602027e-5),
)
_ERF_REACH = 3.917
"""erf(x) / x likewise."""

_LN2_HIGH, _LN2_LOW = 0.693145751953125, 1.428606765330187e-06
_HIGHEST, _LOWEST = 89.0, -87.6

_ROUNDING = 1.5 * 2**23
"""Added to a number of moderate size, this leaves the nearest integer in the last bits."""


def _f(value: float) -> Any:
    return tirx.const(value, "float32")


def _polynomial(x: Any, coefficients: Sequence[float]) -> Any:
    result = _f(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + _f(coefficient)
    return result


class _Names:
    """Values that a formula uses more than once, each computed once, before the formula.

    They are bound one after the other, never within the value of another one: passes of TVM that look at such a value
    twice would take twice as long for every level.
    """

    def __init__(self) -> None:
        self._bound: list[tuple[Any, Any]] = []

    def __call__(self, value: Any) -> Any:
        while isinstance(value, tirx.Let):
            self._bound.append((value.var, value.value))
            value = value.body
        if isinstance(value, tirx.Var):
            return value
        name = tirx.Var("v", value.ty)
        self._bound.append((name, value))
        return name

    def before(self, formula: Any) -> Any:
        """The formula with everything that was bound."""
        for name, value in reversed(self._bound):
            formula = tirx.Let(name, value, formula)
        return formula


def exp(x: Any) -> Any:
    """exp(n ln 2 + r) = 2^n exp(r), where n is the nearest integer to x / ln 2.

    The argument is held between two bounds. Beyond the upper one the result overflows to infinity as it should; at the
    lower one the power is zero.
    """
    names = _Names()
    return names.before(_exp(x, names))


def _exp(x: Any, names: _Names) -> Any:
    x = _held(x, _LOWEST, _HIGHEST, names)
    shifted = names(x * _f(1 / math.log(2)) + _f(_ROUNDING))
    exponent = tirx.reinterpret("int32", shifted) + tirx.const(126, "int32")
    power = tirx.reinterpret("float32", exponent << tirx.const(23, "int32"))
    n = names(shifted - _f(_ROUNDING))
    rest = names(x - n * _f(_LN2_HIGH) - n * _f(_LN2_LOW))
    return _polynomial(rest, [2 * c for c in _EXP]) * power


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x))."""
    names = _Names()
    return names.before(_f(1.0) / (_f(1.0) + _exp(_f(0.0) - names(x), names)))


def tanh(x: Any) -> Any:
    """x P(x^2) / Q(x^2)."""
    return _odd(x, _TANH, _TANH_REACH)


def erf(x: Any) -> Any:
    """x P(x^2) / Q(x^2)."""
    return _odd(x, _ERF, _ERF_REACH)


def _odd(x: Any, quotient: tuple[Sequence[float], Sequence[float]], reach: float) -> Any:
    """The argument is held within the reach, the result within one, which rounding may exceed by two units."""
    names, (above, below) = _Names(), quotient
    x = _held(x, -reach, reach, names)
    square = names(x * x)
    ratio = x * _polynomial(square, above) / _polynomial(square, below)
    return names.before(_held(ratio, -1.0, 1.0, names))


def _held(x: Any, low: float, high: float, names: _Names) -> Any:
    """x, or the nearer of two bounds; NaN stays."""
    x = names(x)
    x = names(tirx.Select(x < _f(low), _f(low), x))
    return names(tirx.Select(x > _f(high), _f(high), x))


_FORMULAS = {"tirx.exp": exp, "tirx.sigmoid": sigmoid, "tirx.tanh": tanh, "tirx.erf": erf}


def nests(code: Any) -> bool:
    """Whether one of these functions is applied to a result of another (tanh of a sum of sigmoids).

    TVM's simplifier puts what is bound into what is computed from it. Written out, a formula within a formula grows to
    hundreds of times its size, one more level down to ten thousands.
    """
    found = False

    def inside(call: Any) -> None:
        nonlocal found
        found = found or _is_ours(call)

    def look(call: Any) -> None:
        if _is_ours(call) and not found:
            for argument in call.args:
                tvm_ffi.structural_walk(argument, (ir.Call, inside))

    tvm_ffi.structural_walk(code, (ir.Call, look))
    return found


def _is_ours(call: Any) -> bool:
    return getattr(call.op, "name", "") in _FORMULAS and str(call.ty.dtype).startswith("float32")


def in_arithmetic(code: Any) -> Any:
    """An expression or statement with these functions of float32 written out."""

    def written_out(call: Any) -> Any:
        formula = _FORMULAS.get(getattr(call.op, "name", ""))
        return formula(call.args[0]) if formula and str(call.ty.dtype) == "float32" else call

    return tvm_ffi.structural_map(code, (ir.Call, written_out), order="post")


_LIBRARY = {"float32": "f", "float64": ""}
"""Dtypes that the C library has these functions for, and how it ends their names."""


def in_library(code: Any) -> Any:
    """An expression or statement with these functions called from the C library.

    What TVM makes of them by itself is not exact: tanh, from a difference of exponentials, has no right digit near 0.
    """

    def called(call: Any) -> Any:
        name = getattr(call.op, "name", "")
        if name not in _FORMULAS or str(call.ty.dtype) not in _LIBRARY:
            return call
        name, dtype, (x,) = name.removeprefix("tirx."), str(call.ty.dtype), call.args
        if name == "sigmoid":
            one = tirx.const(1, dtype)
            return one / (one + tirx.call_pure_extern(dtype, f"exp{_LIBRARY[dtype]}", tirx.const(0, dtype) - x))
        return tirx.call_pure_extern(dtype, f"{name}{_LIBRARY[dtype]}", x)

    return tvm_ffi.structural_map(code, (ir.Call, called), order="post")
