"""Arithmetic, comparison and logic, element by element with numpy broadcasting."""

from __future__ import annotations

import functools
import operator as python
from collections.abc import Callable

import torch
from torch import Tensor

from graphopt.frontends.onnx.dtypes import INTEGERS
from graphopt.frontends.onnx.registry import operator
from graphopt.frontends.onnx.unsigned import same_bits, widened
from graphopt.frontends.onnx.values import Operand, refuse


def _unary(name: str, function: Callable[..., Tensor], since: int = 7) -> None:
    def run(x: Tensor) -> Tensor:
        return widened(function, x)

    operator(name, since=since)(run)


for _name, _function in {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Round": torch.round,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}.items():
    _unary(_name, _function)  # type: ignore[arg-type]  # mypy joins the dict's values to `function`


@operator("IsInf")
def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    if detect_negative and detect_positive:
        return torch.isinf(x)
    if not detect_negative and not detect_positive:
        return torch.zeros_like(x, dtype=torch.bool)
    return torch.isposinf(x) if detect_positive else torch.isneginf(x)


def _dtype(*values: Operand) -> torch.dtype:
    return next(x.dtype for x in values if isinstance(x, Tensor))


@operator("Add")
def add(a: Operand, b: Operand) -> Tensor:
    return same_bits(python.add, a, b)


@operator("Sub")
def subtract(a: Operand, b: Operand) -> Tensor:
    return same_bits(python.sub, a, b)


@operator("Mul")
def multiply(a: Operand, b: Operand) -> Tensor:
    return same_bits(python.mul, a, b)


@operator("Div")
def divide(a: Operand, b: Operand) -> Tensor:
    """Integers are divided towards zero."""
    if _dtype(a, b) not in INTEGERS:
        return a / b  # type: ignore[return-value]  # one of the two is a tensor
    first = a if isinstance(a, Tensor) else torch.scalar_tensor(a, dtype=_dtype(b))
    return widened(lambda x, y: torch.div(x, y, rounding_mode="trunc"), first, b)


@operator("Pow")
def power(x: Tensor, y: Operand) -> Tensor:
    """The result has the dtype of the base."""
    result = widened(torch.pow, x, y)
    return result if result.dtype is x.dtype else result.to(x.dtype)


@operator("Mod", since=10)
def modulo(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """`fmod=0` takes the sign of the divisor, `fmod=1` that of the dividend."""
    if fmod:
        return widened(torch.fmod, a, b)
    if a.dtype.is_floating_point:
        return _floor_modulo(a, b)
    return widened(torch.remainder, a, b)


def _floor_modulo(a: Tensor, b: Tensor) -> Tensor:
    """Floor modulo with the special cases of opset 28: a zero takes the sign of the divisor."""
    result = torch.remainder(a, b)
    return torch.where(result == 0, torch.copysign(result, b), result)


def _compare(name: str, function: Callable[[Operand, Operand], Tensor], since: int = 7) -> None:
    def run(a: Operand, b: Operand) -> Tensor:
        return widened(function, a, b)

    operator(name, since=since)(run)


for _name, _comparison, _since in (
    ("Equal", python.eq, 7),
    ("Greater", python.gt, 7),
    ("Less", python.lt, 7),
    ("GreaterOrEqual", python.ge, 12),
    ("LessOrEqual", python.le, 12),
):
    _compare(_name, _comparison, _since)


def _binary(name: str, function: Callable[[Tensor, Tensor], Tensor], since: int = 7) -> None:
    def run(a: Tensor, b: Tensor) -> Tensor:
        return same_bits(function, a, b)

    operator(name, since=since)(run)


for _name, _logic, _since in (
    ("And", torch.logical_and, 7),
    ("Or", torch.logical_or, 7),
    ("Xor", torch.logical_xor, 7),
    ("BitwiseAnd", torch.bitwise_and, 18),
    ("BitwiseOr", torch.bitwise_or, 18),
    ("BitwiseXor", torch.bitwise_xor, 18),
):
    _binary(_name, _logic, _since)


@operator("BitShift", since=11)
def bit_shift(x: Tensor, y: Tensor, *, direction: str) -> Tensor:
    """Shifts by the width or more, and by negative amounts, give what shifting bit by bit gives."""
    if direction not in ("LEFT", "RIGHT"):
        raise refuse(f"direction '{direction}' is neither LEFT nor RIGHT")
    bits = x.dtype.itemsize * 8
    if x.dtype is torch.uint64:
        raise refuse("torch has no shifts of uint64", "cast to int64 before the node")
    wide, by = x.to(torch.int64), y.to(torch.int64)
    outside = (by < 0) | (by >= bits)
    by = torch.where(outside, 0, by)
    if direction == "LEFT":
        shifted = torch.where(outside, 0, torch.bitwise_left_shift(wide, by))
    else:
        shifted = torch.where(outside, torch.where(wide < 0, -1, 0), torch.bitwise_right_shift(wide, by))
    return shifted.to(x.dtype)


def _larger(a: Operand, b: Operand) -> Operand:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.maximum(a, b)
    if not isinstance(a, Tensor):
        return torch.clamp(b, min=a) if isinstance(b, Tensor) else max(a, b)
    return torch.clamp(a, min=b)


def _smaller(a: Operand, b: Operand) -> Operand:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.minimum(a, b)
    if not isinstance(a, Tensor):
        return torch.clamp(b, max=a) if isinstance(b, Tensor) else min(a, b)
    return torch.clamp(a, max=b)


@operator("Max")
def maximum(*xs: Operand) -> Tensor:
    return functools.reduce(lambda a, b: widened(_larger, a, b), xs)  # type: ignore[return-value]  # one is a tensor


@operator("Min")
def minimum(*xs: Operand) -> Tensor:
    return functools.reduce(lambda a, b: widened(_smaller, a, b), xs)  # type: ignore[return-value]  # one is a tensor


@operator("Sum")
def total(*xs: Tensor) -> Tensor:
    return functools.reduce(torch.add, xs)


@operator("Mean")
def mean(*xs: Tensor) -> Tensor:
    return functools.reduce(torch.add, xs) / len(xs)


@operator("Where", since=9)
def where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(condition, x, y)
