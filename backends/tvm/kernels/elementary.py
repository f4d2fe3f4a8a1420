"""exp, sigmoid, tanh and erf of float32 in plain arithmetic, so that they run in vectors.

LLVM calls the C library for them, one number at a time. The formulas here reduce the argument and evaluate a
polynomial; the coefficients are least-squares fits at Chebyshev nodes, reweighted until the error is even. Largest
relative errors over all finite arguments, against float64 (tests measure them): exp 2e-7, sigmoid 3e-7, tanh 4e-7,
erf 4e-7. NaN gives NaN, infinities give the limits; exp is 0 below -86.9, where it is less than 1.8e-38.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import tvm_ffi
from tvm import ir, tirx

__all__ = ["erf", "exp", "in_arithmetic", "in_library", "sigmoid", "tanh"]

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


def _with(value: Any, body: Callable[[Any], Any]) -> Any:
    """An expression of a value that is computed once."""
    if isinstance(value, tirx.Var):
        return body(value)
    name = tirx.Var("v", value.ty)
    return tirx.Let(name, value, body(name))


def exp(x: Any) -> Any:
    """exp(n ln 2 + r) = 2^n exp(r), where n is the nearest integer to x / ln 2.

    The argument is held between two bounds. Beyond the upper one the result overflows to infinity as it should; at the
    lower one the power is zero.
    """

    def bounded(x: Any) -> Any:
        above = tirx.Select(x < _f(_LOWEST), _f(_LOWEST), x)
        return _with(above, lambda a: tirx.Select(a > _f(_HIGHEST), _f(_HIGHEST), a))

    def scaled(x: Any) -> Any:
        return _with(x * _f(1 / math.log(2)) + _f(_ROUNDING), lambda shifted: raised(x, shifted))

    def raised(x: Any, shifted: Any) -> Any:
        exponent = tirx.reinterpret("int32", shifted) + tirx.const(126, "int32")
        power = tirx.reinterpret("float32", exponent << tirx.const(23, "int32"))

        def product(n: Any) -> Any:
            rest = x - n * _f(_LN2_HIGH) - n * _f(_LN2_LOW)
            return _with(rest, lambda r: _polynomial(r, [2 * c for c in _EXP]) * power)

        return _with(shifted - _f(_ROUNDING), product)

    return _with(bounded(x), scaled)


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x))."""
    return _f(1.0) / (_f(1.0) + exp(_f(0.0) - x))


def tanh(x: Any) -> Any:
    """x P(x^2) / Q(x^2)."""
    return _odd(x, _TANH, _TANH_REACH)


def erf(x: Any) -> Any:
    """x P(x^2) / Q(x^2)."""
    return _odd(x, _ERF, _ERF_REACH)


def _odd(x: Any, quotient: tuple[Sequence[float], Sequence[float]], reach: float) -> Any:
    """The argument is held within the reach, the result within one, which rounding may exceed by two units."""
    above, below = quotient

    def formula(x: Any) -> Any:
        ratio = _with(x * x, lambda z: x * _polynomial(z, above) / _polynomial(z, below))
        return _held(ratio, 1.0)

    return _with(_held(x, reach), formula)


def _held(x: Any, bound: float) -> Any:
    above = _with(x, lambda x: tirx.Select(x < _f(-bound), _f(-bound), x))
    return _with(above, lambda x: tirx.Select(x > _f(bound), _f(bound), x))


_FORMULAS = {"tirx.exp": exp, "tirx.sigmoid": sigmoid, "tirx.tanh": tanh, "tirx.erf": erf}


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
