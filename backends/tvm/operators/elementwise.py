"""Element-wise operators: arithmetic, comparisons, logic, casts.

Arithmetic is done in the dtype torch infers for the result (comparisons: in the promoted dtype of both operands), in
float32 for the 16-bit floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from tvm import ir, relax, te, tirx

from graphopt.backends.tvm.operators import extreme
from graphopt.backends.tvm.registry import Call, Refused, dtype_of, element_wise, wide

aten = torch.ops.aten
op = relax.op


def compute_dtype(call: Call) -> str:
    """Where element-wise arithmetic happens: booleans are added and multiplied as numbers, then cast back."""
    return "int32" if call.dtype == "bool" else wide(call.dtype)


def _unary(function: Callable[[Any], Any]) -> Callable[..., Any]:
    def convert(call: Call, self: Any) -> Any:
        return function(call.operand(self, compute_dtype(call)))

    return convert


def per_element(call: Call, function: Callable[..., Any], *inputs: Any) -> Any:
    """Apply a scalar TIR function to every element of inputs of equal shape."""
    return call.compute(lambda *x: te.compute(x[0].shape, lambda *i: function(*(t(*i) for t in x))), *inputs)


def _scalar_unary(function: Callable[[Any], Any]) -> Callable[..., Any]:
    def convert(call: Call, self: Any) -> Any:
        return per_element(call, function, call.operand(self, compute_dtype(call)))

    return convert


def _one(x: Any) -> Any:
    return tirx.const(1, x.dtype if hasattr(x, "dtype") else str(x.ty.dtype))


_RELAX_UNARY: dict[Any, Callable[[Any], Any]] = {
    aten.abs.default: op.abs,
    aten.acos.default: op.acos,
    aten.acosh.default: op.acosh,
    aten.asin.default: op.asin,
    aten.asinh.default: op.asinh,
    aten.atan.default: op.atan,
    aten.atanh.default: op.atanh,
    aten.ceil.default: op.ceil,
    aten.cos.default: op.cos,
    aten.cosh.default: op.cosh,
    aten.erf.default: op.erf,
    aten.exp.default: op.exp,
    aten.floor.default: op.floor,
    aten.log.default: op.log,
    aten.neg.default: op.negative,
    aten.rsqrt.default: op.rsqrt,
    aten.selu.default: op.nn.selu,
    aten.sigmoid.default: op.sigmoid,
    aten.sign.default: op.sign,
    aten.silu.default: op.nn.silu,
    aten.sin.default: op.sin,
    aten.sinh.default: op.sinh,
    aten.sqrt.default: op.sqrt,
    aten.square.default: op.square,
    aten.tan.default: op.tan,
    aten.tanh.default: op.tanh,
    aten.trunc.default: op.trunc,
}
for _overload, _function in _RELAX_UNARY.items():
    element_wise(_overload)(_unary(_function))

_SCALAR_UNARY: dict[Any, Callable[[Any], Any]] = {
    aten.log10.default: tirx.log10,
    aten.log1p.default: tirx.log1p,
    aten.log2.default: tirx.log2,
    aten.reciprocal.default: lambda x: _one(x) / x,
    aten.round.default: tirx.nearbyint,
}
for _overload, _function in _SCALAR_UNARY.items():
    element_wise(_overload)(_scalar_unary(_function))


def operands(call: Call, a: Any, b: Any, dtype: str) -> tuple[Any, Any]:
    return call.operand(a, dtype), call.operand(b, dtype)


def _binary(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def convert(call: Call, self: Any, other: Any) -> Any:
        return function(*operands(call, self, other, compute_dtype(call)))

    return convert


@element_wise(aten.mul.Tensor, aten.mul.Scalar)
def mul(call: Call, self: Any, other: Any) -> Any:
    a, b = operands(call, self, other, compute_dtype(call))
    for factor, x in ((a, b), (b, a)):
        if _is_scalar_zero(factor) and "float" in dtype_of(x):
            return per_element(call, _times_zero, *broadcast(call, x))
    return op.multiply(a, b)


def _times_zero(x: Any) -> Any:
    """x * 0: NaN for infinities and NaN. (TVM simplifies it to 0.)"""
    dtype = str(x.ty.dtype)
    finite = tirx.all(tirx.Not(tirx.isnan(x)), tirx.Not(tirx.isinf(x)))
    return tirx.Select(finite, tirx.const(0, dtype), tirx.const(math.nan, dtype))


def _is_scalar_zero(value: Any) -> bool:
    return isinstance(value, ir.GenericConst) and len(value.value.shape) == 0 and not value.value.numpy().any()


@element_wise(aten.div.Tensor, aten.div.Scalar)
def div(call: Call, self: Any, other: Any) -> Any:
    """A quotient. A constant divisor is inverted while compiling: a product is several times faster, and differs by a
    unit in the last place at most."""
    dtype = compute_dtype(call)
    a, b = operands(call, self, other, dtype)
    inverse = _inverse(b) if dtype == "float32" and not call.machine.exact else None
    return op.divide(a, b) if inverse is None else op.multiply(a, inverse)


def _inverse(value: Any) -> Any | None:
    """One over a constant number; None where that is no normal number."""
    if not isinstance(value, ir.GenericConst) or len(value.value.shape):
        return None
    number = float(value.value.numpy())
    inverse = 1 / number if number else math.inf
    return relax.const(inverse, "float32") if 1e-30 < abs(inverse) < 1e30 else None


element_wise(aten.atan2.default)(_binary(op.atan2))


@element_wise(aten.add.Tensor, aten.add.Scalar)
def add(call: Call, self: Any, other: Any, alpha: Any = 1) -> Any:
    dtype = compute_dtype(call)
    return op.add(call.operand(self, dtype), _scaled(call, other, alpha, dtype))


@element_wise(aten.sub.Tensor, aten.sub.Scalar)
def sub(call: Call, self: Any, other: Any, alpha: Any = 1) -> Any:
    dtype = compute_dtype(call)
    return op.subtract(call.operand(self, dtype), _scaled(call, other, alpha, dtype))


@element_wise(aten.rsub.Tensor, aten.rsub.Scalar)
def rsub(call: Call, self: Any, other: Any, alpha: Any = 1) -> Any:
    dtype = compute_dtype(call)
    return op.subtract(call.operand(other, dtype), _scaled(call, self, alpha, dtype))


def _scaled(call: Call, value: Any, alpha: Any, dtype: str) -> Any:
    operand = call.operand(value, dtype)
    return operand if alpha == 1 else call.emit(op.multiply(operand, relax.const(alpha, dtype)))


@element_wise(aten.div.Tensor_mode, aten.div.Scalar_mode)
def div_mode(call: Call, self: Any, other: Any, rounding_mode: str | None) -> Any:
    a, b = operands(call, self, other, compute_dtype(call))
    if rounding_mode is None:
        return op.divide(a, b)
    if rounding_mode == "floor":
        return op.floor_divide(a, b)
    if "float" in call.dtype:
        return op.trunc(call.emit(op.divide(a, b)))
    a, b = broadcast(call, a, b)
    return per_element(call, tirx.truncdiv, a, b)


element_wise(aten.floor_divide.default, aten.floor_divide.Scalar)(_binary(op.floor_divide))


def broadcast(call: Call, *values: Any) -> list[Any]:
    return [call.emit(op.broadcast_to(value, call.shape)) for value in values]


@element_wise(aten.remainder.Tensor, aten.remainder.Scalar)
def remainder(call: Call, self: Any, other: Any) -> Any:
    """The remainder with the sign of the divisor."""
    if "float" not in call.dtype:
        return op.floor_mod(*operands(call, self, other, compute_dtype(call)))

    def scalar(x: Any, y: Any) -> Any:
        rest = _float_rest(x, y)
        return tirx.Select(rest * y < 0.0, rest + y, rest)

    return per_element(call, scalar, *_exact_operands(call, self, other))


@element_wise(aten.fmod.Tensor, aten.fmod.Scalar)
def fmod(call: Call, self: Any, other: Any) -> Any:
    """The remainder with the sign of the dividend."""
    if "float" in call.dtype:
        return per_element(call, _float_rest, *_exact_operands(call, self, other))
    return per_element(call, tirx.truncmod, *broadcast(call, *operands(call, self, other, call.dtype)))


def _exact_operands(call: Call, a: Any, b: Any) -> list[Any]:
    """Operands in float64, in which quotients of narrower floats below 2^29 lose nothing."""
    if call.dtype == "float64":
        raise Refused("the remainder of float64, for which there is no wider type")
    return broadcast(call, *operands(call, a, b, "float64"))


def _float_rest(x: Any, y: Any) -> Any:
    return tirx.Select(tirx.isinf(y), x, x - tirx.trunc(x / y) * y)


@element_wise(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar)
def power(call: Call, self: Any, exponent: Any) -> Any:
    dtype = compute_dtype(call)
    if isinstance(exponent, int | float) and exponent in (0.5, 1, 2, 3):
        base = call.operand(self, dtype)
        if exponent == 0.5:
            return op.sqrt(base)
        result = base
        for _ in range(int(exponent) - 1):
            result = call.emit(op.multiply(result, base))
        return result
    if "float" not in dtype:
        raise Refused(f"an integer power with exponent {exponent}")
    return op.power(*operands(call, self, exponent, dtype))


def truth(call: Call, value: Any) -> Any:
    dtype = dtype_of(value)
    return value if dtype == "bool" else per_element(call, extreme.not_zero, call.cast(value, wide(dtype)))


@element_wise(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def where(call: Call, condition: Any, self: Any, other: Any) -> Any:
    return op.where(truth(call, condition), *operands(call, self, other, call.dtype))


@element_wise(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(call: Call, self: Any, mask: Any, value: Any) -> Any:
    return op.where(mask, *operands(call, value, self, call.dtype))


def _choice(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def convert(call: Call, self: Any, other: Any) -> Any:
        return per_element(call, function, *broadcast(call, *operands(call, self, other, compute_dtype(call))))

    return convert


element_wise(aten.maximum.default, aten.max.other)(_choice(extreme.larger))
element_wise(aten.minimum.default, aten.min.other)(_choice(extreme.smaller))


@element_wise(aten.clamp.default, aten.clamp.Tensor)
def clamp(call: Call, self: Any, min: Any = None, max: Any = None) -> Any:
    """min(max(x, low), high); NaN where one of them is."""
    dtype = compute_dtype(call)
    result = call.operand(self, dtype)
    for bound, function in ((min, extreme.larger), (max, extreme.smaller)):
        if bound is not None:
            result = per_element(call, function, *broadcast(call, result, call.operand(bound, dtype)))
    return result


@element_wise(aten.clamp_min.default)
def clamp_min(call: Call, self: Any, min: Any) -> Any:
    return clamp(call, self, min)


@element_wise(aten.clamp_max.default)
def clamp_max(call: Call, self: Any, max: Any) -> Any:
    return clamp(call, self, None, max)


@element_wise(aten.isnan.default)
def isnan(call: Call, self: Any) -> Any:
    return op.isnan(call.cast(self, wide(dtype_of(self))))


@element_wise(aten.isinf.default)
def isinf(call: Call, self: Any) -> Any:
    return op.isinf(call.cast(self, wide(dtype_of(self))))


@element_wise(aten.expm1.default)
def expm1(call: Call, self: Any) -> Any:
    """exp(x) - 1; below 1e-2 by its series to the fourth power, whose error there is below 1e-12."""

    def scalar(x: Any) -> Any:
        series = x * (1.0 + x * (0.5 + x * (1 / 6 + x / 24)))
        return tirx.Select(tirx.abs(x) < 1e-2, series, tirx.exp(x) - 1.0)

    return per_element(call, scalar, call.operand(self, compute_dtype(call)))


@element_wise(
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
    aten.resolve_conj.default,
    aten.resolve_neg.default,
)
def same_values(call: Call, self: Any, **placement: Any) -> Any:
    """The same numbers in the dtype of the result; memory format, layout and device do not concern a compiled graph.

    A float becomes an integer by truncation, as in C; a number becomes a boolean by comparison with zero.
    """
    return truth(call, self) if call.dtype == "bool" else call.cast(self, call.dtype)


@element_wise(aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
def dropout(call: Call, input: Any, p: float, train: bool) -> Any:
    if train and p > 0:
        raise Refused("dropout in training mode is random; call model.eval() first")
    return input


@element_wise(aten.logaddexp.default)
def logaddexp(call: Call, self: Any, other: Any) -> Any:
    a, b = broadcast(call, *operands(call, self, other, compute_dtype(call)))

    def scalar(x: Any, y: Any) -> Any:
        return tirx.max(x, y) + tirx.log1p(tirx.exp(tirx.const(0, dtype_of(a)) - tirx.abs(x - y)))

    return per_element(call, scalar, a, b)


@element_wise(aten.hypot.default)
def hypot(call: Call, self: Any, other: Any) -> Any:
    return per_element(call, tirx.hypot, *broadcast(call, *operands(call, self, other, compute_dtype(call))))


@element_wise(aten.copy.default)
def copy(call: Call, self: Any, src: Any, non_blocking: bool = False) -> Any:
    return op.broadcast_to(call.cast(src, call.dtype), call.shape)
