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

from graphopt.backends.tvm.kernels.emit import Code, vector

__all__ = ["BY_LIBRARY", "depends_on_condition", "in_arithmetic", "in_library"]

BY_LIBRARY = "graphopt.by_library"
"""Attribute of a function in which no arithmetic may replace these functions."""

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


def _polynomial(x: Any, coefficients: Sequence[float]) -> Any:
    result = _like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + _like(x, coefficient)
    return result


def _like(x: Any, value: float) -> Any:
    """A constant of the dtype of x, in as many lanes."""
    return tirx.const(value, x.ty.dtype)


class _Names:
    """Values that a formula uses more than once, each computed once, in statements before the formula's.

    They pass through memory, as far as TVM can tell (LLVM keeps them in registers): TVM's simplifier would put a bound
    value into what is computed from it, and so on. A formula would grow to a hundred times its size, and a formula of
    a formula to ten thousand times.
    """

    def __init__(self) -> None:
        self.code = Code()

    def __call__(self, value: Any) -> Any:
        lanes = int(getattr(value.ty.dtype, "lanes", 1))
        place = vector(0, lanes)
        kept = self.code.local("v", lanes)
        self.code.store(kept, place, value)
        return kept[place]


def _exp(x: Any, names: _Names) -> Any:
    """exp(n ln 2 + r) = 2^n exp(r), where n is the nearest integer to x / ln 2.

    The argument is held between two bounds. Beyond the upper one the result overflows to infinity as it should; at the
    lower one the power is zero.
    """
    x = _held(x, _LOWEST, _HIGHEST, names)
    integers = str(x.ty.dtype).replace("float", "int")
    shifted = names(x * _like(x, 1 / math.log(2)) + _like(x, _ROUNDING))
    exponent = tirx.reinterpret(integers, shifted) + tirx.const(126, integers)
    power = tirx.reinterpret(x.ty.dtype, exponent << tirx.const(23, integers))
    n = names(shifted - _like(x, _ROUNDING))
    rest = names(x - n * _like(x, _LN2_HIGH) - n * _like(x, _LN2_LOW))
    return _polynomial(rest, [2 * c for c in _EXP]) * power


def _sigmoid(x: Any, names: _Names) -> Any:
    """1 / (1 + exp(-x))."""
    one = _like(x, 1.0)
    return one / (one + _exp(_like(x, 0.0) - names(x), names))


def _tanh(x: Any, names: _Names) -> Any:
    """x P(x^2) / Q(x^2)."""
    return _odd(x, _TANH, _TANH_REACH, names)


def _erf(x: Any, names: _Names) -> Any:
    """x P(x^2) / Q(x^2)."""
    return _odd(x, _ERF, _ERF_REACH, names)


def _odd(x: Any, quotient: tuple[Sequence[float], Sequence[float]], reach: float, names: _Names) -> Any:
    """The argument is held within the reach, the result within one, which rounding may exceed by two units."""
    above, below = quotient
    x = _held(x, -reach, reach, names)
    square = names(x * x)
    ratio = x * _polynomial(square, above) / _polynomial(square, below)
    return _held(ratio, -1.0, 1.0, names)


def _held(x: Any, low: float, high: float, names: _Names) -> Any:
    """x, or the nearer of two bounds; NaN stays."""
    x = names(x)
    x = names(tirx.Select(x < _like(x, low), _like(x, low), x))
    return names(tirx.Select(x > _like(x, high), _like(x, high), x))


_FORMULAS = {"tirx.exp": _exp, "tirx.sigmoid": _sigmoid, "tirx.tanh": _tanh, "tirx.erf": _erf}


def _is_ours(call: Any) -> bool:
    return getattr(call.op, "name", "") in _FORMULAS and str(call.ty.dtype).split("x")[0] == "float32"


def depends_on_condition(code: Any) -> bool:
    """Whether one of these functions is applied only where a condition holds (padding after exp, say).

    Its argument may not exist elsewhere, so that it cannot be computed in a statement before. The same holds within
    an expression that names a value.
    """
    found = False

    def inside(call: Any) -> None:
        nonlocal found
        found = found or _is_ours(call)

    def look(call: Any) -> None:
        if getattr(call.op, "name", "") == "prim.if_then_else":
            tvm_ffi.structural_walk(call, (ir.Call, inside))

    def name(let: Any) -> None:
        tvm_ffi.structural_walk(let, (ir.Call, inside))

    tvm_ffi.structural_walk(code, [(ir.Call, look), (tirx.Let, name)])
    return found


def in_arithmetic(code: Any) -> Any:
    """A statement with these functions of float32 written out, wherever a value is stored or bound.

    Loops are in vectors already: TVM takes statements like these, within a loop that it is to make a vector of, apart
    into single numbers.
    """

    def value_of(value: Any) -> tuple[Any, Code]:
        names = _Names()

        def written_out(call: Any) -> Any:
            return _FORMULAS[call.op.name](call.args[0], names) if _is_ours(call) else call

        return tvm_ffi.structural_map(value, (ir.Call, written_out), order="post"), names.code

    def stored(store: Any) -> Any:
        value, code = value_of(store.value)
        code.add(tirx.BufferStore(store.buffer, value, store.indices))
        return code.done()

    def bound(bind: Any) -> Any:
        value, code = value_of(bind.value)
        code.add(tirx.Bind(bind.var, value))
        return code.done()

    return tvm_ffi.structural_map(code, [(tirx.BufferStore, stored), (tirx.Bind, bound)], order="post")


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
